"""Write one section of a recipe to a file, touching it only where the section has changed: make's notion of up to date.

python recipes/section.py recipes/demo.yaml profile runs/sections/demo/profile.yaml
"""

import sys
from pathlib import Path

import yaml

recipe, name, target = sys.argv[1:]
section = yaml.safe_dump(yaml.safe_load(Path(recipe).read_text(encoding="utf-8")).get(name), sort_keys=True)
path = Path(target)
if not path.is_file() or path.read_text(encoding="utf-8") != section:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(section, encoding="utf-8")
