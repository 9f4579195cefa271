# make demo   install, render the demo data, train and evaluate three methods, compare them in report.html
# make test   the fast tests
# make bench  measure speed and memory; DATA=/path/to/mpdd CATEGORY=metal_plate for other images than the demo set's
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint bench bench-full bench-peers

# The stamp is younger than what it was installed from, so that a second call installs nothing.
$(INSTALLED): setup.py requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing (torch is large: this takes a few minutes the first time)"
	$(BIN)/python -m pip install --progress-bar on -r requirements.txt -e '.[offline,dev]'
	touch $@

# Runs are never overwritten: of a second call the newest folder of each method is the one that is compared.
DEMO_RUN := --device cpu --save_anomaly_scores --log_project demo
newest = $$(ls -td demo/results/demo/$(1)* | head -n 1)

demo: $(INSTALLED)
	$(BIN)/python bin/make_demo_dataset.py demo/data
	$(BIN)/python bin/run_patchcore.py $(DEMO_RUN) --save_segmentation_images --save_patchcore_model \
		--log_group PatchCore demo/results \
		patch_core -b efficientnet_lite0 -le blocks.2 -le blocks.4 --anomaly_scorer_num_nn 1 \
		sampler -p 0.1 approx_greedy_coreset dataset --batch_size 8 mpdd demo/data
	$(BIN)/python bin/run_fastflow.py $(DEMO_RUN) --log_group FastFlow --calibration split demo/results \
		fastflow --backbone efficientnet_lite0 --use_class_specific --epochs 10 \
		dataset --batch_size 8 --train_val_split 0.8 mpdd demo/data
	$(BIN)/python bin/run_baselines.py $(DEMO_RUN) --log_group ResNetKNN demo/results \
		resnet_knn -b efficientnet_lite0 --clamp_k dataset --batch_size 8 mpdd demo/data
	$(BIN)/python bin/compare_results.py $(call newest,PatchCore) $(call newest,FastFlow) $(call newest,ResNetKNN) \
		--html --out demo/comparison

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -rs -n auto --maxprocesses 4 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x bash/*.sh sample_*.sh
	$(BIN)/oxlint --deny-warnings -D correctness -D suspicious src/patchcore/report_html

CATEGORY ?= metal_plate
MEASURED := $(if $(DATA),--data "$(DATA)") --category "$(CATEGORY)"
PEERS := .venv-peers

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(MEASURED)

bench-full: bench
	$(BIN)/python benchmarks/stage_shares.py $(MEASURED)
	$(BIN)/python benchmarks/run.py --rows coreset_large $(MEASURED)
	$(BIN)/python benchmarks/search.py --data "$(or $(DATA),demo/data)" --category "$(CATEGORY)"
	$(BIN)/python benchmarks/export.py $(MEASURED)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/launchers.py $(MEASURED)
	$(BIN)/python benchmarks/shards.py --data "$(or $(DATA),demo/data)" --category "$(CATEGORY)"
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/fastflow.py
	$(BIN)/python benchmarks/fastflow_tiles.py

bench-peers: $(INSTALLED) $(PEERS)/.installed
	$(BIN)/python benchmarks/peers.py --python $(PEERS)/bin/python $(MEASURED)

$(PEERS)/.installed: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --progress-bar on -r benchmarks/requirements-peers.txt
	touch $@
