"""mmkit: image–text fusion, learnt by running it. See the notebooks."""

from importlib import import_module

# Module → its public names. A module is imported when one of its names is first used, so that what needs no torch
# (drawing scenes, checking or downloading a folder) starts at once and in little memory.
_NAMES: dict[str, tuple[str, ...]] = {
    "baselines": ("RegularizedCCA", "TwoTower"),
    "browser": ("browse",),
    "checkpoints": ("is_trained", "load_checkpoint", "save_checkpoint", "training_recipe"),
    "check": ("CheckReport", "check_folder"),
    "data": ("CaptionDataset", "DiagnosticNegatives", "load_captions", "load_dataset"),
    "download": ("download_coco",),
    "edges": (
        "attention_edges",
        "cosine_knn_edges",
        "dirichlet_energy",
        "mean_pairwise_distance",
        "to_dense",
        "to_edges",
    ),
    "encoders": ("Encoders", "ImageEncoder", "TextEncoder"),
    "errors": ("MissingFile", "MmkitError"),
    "evaluation": (
        "choose_thresholds",
        "matching_logits",
        "matching_report",
        "negative_pairs",
        "noise_recall",
        "permutation_gap",
        "report_json",
        "retrieval_report",
    ),
    "extraction": ("extract_features",),
    "facts": ("FACTS",),
    "features": ("FalseCaptions", "FeatureStore", "PairedFeatures"),
    "fusers": ("GatedFuser", "MultimodalFeatureFuser", "PairFuser"),
    "galleries": ("show_attention", "show_graph", "show_images", "show_pairs", "show_region_words", "show_retrieval"),
    "graphs": ("HeteroGNN", "MultimodalGNN"),
    "hubness": ("HubnessCorrected",),
    "losses": ("contradiction_loss", "contrastive_loss", "matching_loss"),
    "metrics": (
        "Interval",
        "Reliability",
        "best_threshold",
        "bootstrap",
        "constant_scores",
        "mean_and_deviation",
        "ranks",
        "reliability",
    ),
    "parts": ("CrossAttentionFuser", "PartFuser", "RegionWordGNN"),
    "pictures": ("open_image", "to_rgb"),
    "planning": ("plan_table", "read_measured"),
    "plots": (
        "plot_bars",
        "plot_differences",
        "plot_histogram",
        "plot_history",
        "plot_lines",
        "plot_map",
        "plot_matrix",
        "plot_recalls",
        "plot_tokens",
    ),
    "preprocess": ("MultimodalPreprocessor", "image_transform"),
    "profiles": ("Profile", "profile"),
    "protocols": (
        "diagnostic_pairs",
        "diagnostic_report",
        "eccv_scores",
        "encode_texts",
        "false_captions",
        "folded_retrieval",
    ),
    "results": ("Results", "load_results"),
    "scenes": ("draw_scenes",),
    "training": ("FUSERS", "History", "build_fuser", "fit", "fit_profile"),
    "tuning": ("LoRATextFuser", "token_ids", "tokenized"),
    "zoo": ("EncoderCard", "encoder_table", "encoders_of", "list_encoders", "load_encoders"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value  # found without this function from now on
        return value
    if name in _NAMES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
