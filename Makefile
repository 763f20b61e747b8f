PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

.PHONY: test lint demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile

lint: $(INSTALLED)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

demo: $(INSTALLED)
	$(VENV)/bin/python demo/run_demo.py

$(INSTALLED): requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt
	touch $@
