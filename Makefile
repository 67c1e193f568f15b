# make demo: see the demo checkpoint answer.  make finetune: teach it facts.  make test: run the tests;  make test-slow:
# those that take long.  make docs: test the documents.  They make .venv first, with PYTHON, which may be 3.8 to 3.13.
PYTHON ?= python3
VENV := .venv
EVALUATION := .cache/evaluation
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile
# Releases of transformers for `make matrix`, or newest, or newest-torch; none: all, which writes docs/compatibility.md.
RELEASES ?=

# What tests the documents: their snippets, commands, figures and links.
DOCUMENTS := $(wildcard $(addprefix tests/test_,readme.py docs.py model_card.py tokenization_docs.py faq.py deployment.py \
	published_programs.py)) tests/test_estimate_memory.py::test_figures_of_the_page \
	tests/test_finetune.py::test_snippets_of_the_pages

# .venv keeps its Python: to ask for another one would do nothing.
ifeq ($(origin PYTHON),command line)
ifneq ($(wildcard $(PY)),)
ifneq ($(shell $(PYTHON) --version),$(shell $(PY) --version))
$(error $(VENV) has $(shell $(PY) --version), which is not $(PYTHON). Remove it first: make clean)
endif
endif
endif

.PHONY: demo finetune test test-slow docs lint matrix conformance conformance-quick evaluation-test evaluate retrain clean

demo: $(VENV)/run.stamp
	$(PY) examples/quickstart.py demo

finetune: $(VENV)/finetune.stamp
	rm -rf .cache/finetune
	$(PY) finetune/finetune.py --model_name_or_path demo --data_path finetune/example.json \
		--output_dir .cache/finetune --use_lora \
		--lora_target_modules c_attn c_proj w1 w2 lm_head --lora_alpha 64 --lora_dropout 0 --train_on answers \
		--learning_rate 5e-4 --lr_scheduler_type cosine --warmup_steps 10 --num_train_epochs 3 \
		--per_device_train_batch_size 8 --model_max_length 512 --save_strategy no --logging_steps 20
	$(PY) finetune/compare_answers.py demo .cache/finetune "In what country is Sydney?" "请告诉我大阪在哪个国家。" \
		"What is the capital of Kenya?"

test: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow"

# What takes long: it trains, starts many processes, compiles, or computes GPU kernels on the CPU.
test-slow: $(VENV)/dev.stamp
	$(PYTEST) -m slow

docs: $(VENV)/dev.stamp
	$(PY) -m pytest $(DOCUMENTS)

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The whole test suite with other releases of transformers, which share the torch of .venv.
matrix: $(VENV)/dev.stamp
	$(PY) tests/matrix.py $(RELEASES)

# Quantisers, exporters and transformers' own tests, each release in an environment of its own.
conformance: $(VENV)/dev.stamp
	$(PY) tests/conformance.py $(RELEASES)

# What of it takes a few minutes, with the release in .venv.
conformance-quick: $(VENV)/dev.stamp
	$(PY) tests/conformance.py --quick

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

$(VENV)/finetune.stamp: requirements-finetune.txt $(VENV)/run.stamp
	$(PY) -m pip install --quiet -r requirements-finetune.txt
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
