"""mmkit: image–text fusion, learnt by running it. See the notebooks."""

from .data import CaptionDataset, check_images, load_captions, load_dataset
from .encoders import Encoders, ImageEncoder, TextEncoder, load_encoders
from .errors import MissingFile, MmkitError
from .evaluation import (
    best_threshold,
    choose_thresholds,
    matching_logits,
    matching_report,
    negative_pairs,
    noise_recall,
    permutation_gap,
    ranks,
    report_json,
    retrieval_report,
)
from .features import FeatureStore, PairedFeatures, extract_features
from .fusers import MultimodalFeatureFuser, PairFuser
from .graphs import MultimodalGNN, cosine_knn_edges
from .losses import contrastive_loss, matching_loss
from .plots import (
    plot_bars,
    plot_histogram,
    plot_history,
    plot_lines,
    plot_map,
    plot_matrix,
    plot_recalls,
    plot_tokens,
    show_graph,
    show_images,
    show_pairs,
    show_retrieval,
)
from .preprocess import MultimodalPreprocessor, image_transform
from .profiles import Profile, profile
from .scenes import draw_scenes
from .training import FUSERS, History, build_fuser, fit, fit_profile, load_checkpoint, save_checkpoint
