# Two commands do everything: `make study` and `make test`. Both set themselves up in .venv.
PYTHON ?= python3
VENV ?= .venv
PRESET ?= laptop
OUT ?= studies/$(PRESET)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
CONSTRAINTS := $(if $(CI),-c constraints.txt)
# the corpus packages hold large modules that are read as files, never imported: compile what is
# imported, when it is, even where the environment says not to (each process would do it again)
export PYTHONDONTWRITEBYTECODE =
INSTALL := $(PIP) install --no-compile $(CONSTRAINTS)

.PHONY: study test faults lint notebooks clean

study: $(VENV)/study.ok
	$(VENV)/bin/python experiments/study.py --preset $(PRESET) --out $(OUT)

test: $(VENV)/test.ok
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

# every fault instead of a sample, for an hour or more; a row a test
faults: $(VENV)/test.ok
	mkdir -p studies
	rm -f studies/faults.jsonl
	$(VENV)/bin/python -m pytest tests/faults -m "slow or not slow" --dist=load --draw $$(date +%s) --long studies/faults.jsonl

# tracked notebooks and README's figure change here only: redrawn from experiments/results, and
# published_laws where TINYLM_PUBLISHED names the tables' folder
notebooks: $(VENV)/test.ok
	$(VENV)/bin/python -c "import os; from pathlib import Path; from tinylm.look.notebook import execute; \
	place = Path('experiments/results/laptop'); \
	[execute(source, place, source.with_suffix('.ipynb')) for source in sorted(Path('notebooks').glob('*.py')) if source.stem != 'published_laws' or 'TINYLM_PUBLISHED' in os.environ]"
	$(VENV)/bin/python -c "from pathlib import Path; from tinylm import files; from tinylm.look import plots; \
	from tinylm.look.study import Study; place = Path('experiments/results/laptop'); \
	files.write_text(place / 'loss_axis.svg', plots.standalone(plots.loss_axis(Study(place))))"

lint: $(VENV)/test.ok
	$(VENV)/bin/ruff check .

$(VENV)/study.ok: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"error: Python {v[0]}.{v[1]} is not 3.11 to 3.13; run make PYTHON=python3.12")'
	@echo "setting up $(VENV): a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[corpus,parquet,notebooks,serve]'
	touch $@

$(VENV)/test.ok: $(VENV)/study.ok
	$(INSTALL) -e '.[corpus,parquet,notebooks,serve,dev]'
	touch $@

clean:
	rm -rf $(VENV)
