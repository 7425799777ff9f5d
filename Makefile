# make run    execute the notebooks in order        make lab    open them in JupyterLab
# make test   unit tests, and every notebook as one  make bench  measure against plain baselines
# make test-all  and the slow tests, which kill processes, wait, or start jobs
# make results  take the runs of several seeds behind the tables again, where something changed (some hours)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow test-all lab bench results notebooks lint env clean

run: env
	@$(BIN)/python -m mmkit run

test: lint
	$(BIN)/python -m pytest -m "not slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=600 -W ignore notebooks # two at a time, a thread each

test-slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow # spinning threads would wait for each other beside other work

test-all: test test-slow

lab: env
	$(BIN)/jupyter lab notebooks/00_does_it_fit.ipynb

bench: env
	$(BIN)/python tests/bench/bench.py

results: env # photos take part where MMKIT_COCO_ROOT names their folder
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/results/run.py

notebooks: env # execute the notebooks over themselves, to commit them
	$(BIN)/python -m mmkit run --in-place

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check

env: .venv/installed

# The stamp is written last: an interrupted installation starts again from nothing.
.venv/installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmkit needs Python 3.11 or newer. Remedy: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -f $@ || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv (once, a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[lab,test]'
	@touch $@

clean:
	rm -rf build .venv *.egg-info
