"""The command line: importing it loads neither torch nor a data set."""

from patchcore.cli.baselines import load_and_evaluate_baselines as load_and_evaluate_baselines
from patchcore.cli.baselines import run_baselines as run_baselines
from patchcore.cli.comparison import compare_results as compare_results
from patchcore.cli.comparison import fewshot_curve as fewshot_curve
from patchcore.cli.demo import make_demo_dataset as make_demo_dataset
from patchcore.cli.exploration import explore_dataset as explore_dataset
from patchcore.cli.export import export_model as export_model
from patchcore.cli.fastflow import load_and_evaluate_fastflow as load_and_evaluate_fastflow
from patchcore.cli.fastflow import run_fastflow as run_fastflow
from patchcore.cli.patchcore import load_and_evaluate_patchcore as load_and_evaluate_patchcore
from patchcore.cli.patchcore import run_patchcore as run_patchcore
from patchcore.cli.predict import predict as predict
from patchcore.cli.serve import serve_demo as serve_demo
from patchcore.cli.sweep import run_sweep as run_sweep
from patchcore.cli.update_model import update_model as update_model
