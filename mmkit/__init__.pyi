"""The public names, in the order of the lessons."""

# leaves: the one knob, the errors that a reader can mend, and whether a result or an answer is as it should be
from .profiles import Profile, profile
from .support import MissingFile, MmkitError, check, expect

# 1 · pictures and captions, pixels and tokens
from .data import CaptionDataset, DiagnosticNegatives, load_captions, load_dataset
from .folders import CheckReport, check_folder, download_coco, open_image
from .preprocess import MultimodalPreprocessor, image_transform
from .scenes import FACTS, draw_scenes

# 2 · frozen encoders, features extracted once
from .encoders import IMAGE_ENCODERS, TEXT_ENCODERS, Encoders, ImageEncoder, TextEncoder, encoders_of, load_encoders
from .features import FalseCaptions, PairedFeatures, autocast, extract_features, extract_texts
from .store import FeatureTable

# 3 · the MLP fuser, its losses, the loop
from .fusers import GatedFuser, MultimodalFeatureFuser, PairFuser
from .losses import Batch, JointLoss, contradiction_loss, contrastive_loss, matching_loss, sample_negatives
from .training import History, fit

# 4 and 6 · what a figure means
from .baselines import HubnessCorrected, RegularizedCCA, TwoTower
from .diagnostics import diagnostic_pairs, diagnostic_report, false_captions, noise_recall, permutation_gap
from .evaluation import Interval, Pool, bootstrap, choose_thresholds, encode_pool, matching_logits
from .evaluation import matching_report, negative_pairs, pool_ranks, ranks, retrieval_report, shortlist_ranks

# 5 and 7 · graphs over a pool, and inside one pair
from .graphs import HeteroGNN, MultimodalGNN, attention_edges, cosine_knn_edges
from .regions import CrossAttentionFuser, RegionWordGNN, cell_positions

# 8 and 9 · every fuser by its name, a trained one on disk; tables of several seeds; a text encoder that learns too
from .checkpoints import FUSERS, build_fuser, load_checkpoint, report_json, save_checkpoint, training_recipe
from .lora import LoRATextFuser, tokenized
from .results import Results, load_results

# every figure
from .plots import diagram, figure, plot_bars, plot_differences, plot_graph, plot_histogram, plot_history, plot_lines
from .plots import plot_map, plot_matrix, plot_tokens, show, show_attention, show_images, show_pairs
from .plots import show_retrieval
