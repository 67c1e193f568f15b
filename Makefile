# make demo: see the demo checkpoint answer.  make test: run the tests.  Both make .venv first.
PYTHON ?= python3
VENV := .venv
EVALUATION := .cache/evaluation
PY := $(VENV)/bin/python
# Releases of transformers for `make matrix`, or newest, or newest-torch; none: all, which writes docs/compatibility.md.
RELEASES ?=

.PHONY: demo test lint matrix evaluation-test evaluate retrain clean

demo: $(VENV)/run.stamp
	$(PY) examples/quickstart.py demo

test: $(VENV)/dev.stamp
	$(PY) -m pytest

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The whole test suite with other releases of transformers, which share the torch of .venv.
matrix: $(VENV)/dev.stamp
	$(PY) tests/matrix.py $(RELEASES)

# The evaluation with lm-eval, which has an environment of its own that shares the rest with .venv.
evaluation-test: $(EVALUATION)/stamp
	$(EVALUATION)/bin/python -m pytest tests/test_lm_eval.py

evaluate: $(VENV)/run.stamp
	$(PY) demo/evaluate.py

retrain: $(VENV)/dev.stamp
	$(PY) demo/train.py

$(VENV)/run.stamp: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/run.stamp
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(EVALUATION)/stamp: requirements-evaluation.txt $(VENV)/dev.stamp
	$(PY) -m venv --clear $(EVALUATION)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(EVALUATION)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	$(EVALUATION)/bin/python -m pip install --quiet -r requirements-evaluation.txt
	touch $@

clean:
	rm -rf $(VENV) .cache
