"Packaging, read from settings.ini: the one place for the name, the version and the dependencies."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lab = cfg["lab_requirements"].split()
statuses = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}

# Folders beside the package that an installed package carries inside, and what of them.
CARRIED = {"exercises": "*.ipynb", "benchmarks/results": "**/*.*"}


class CarryFolders(build_py):
    "Builds the package with copies of the folders that it reads."

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return  # the package then reads the folders where they are
        for folder, pattern in CARRIED.items():
            for file in sorted(Path(folder).glob(pattern)):
                target = Path(self.build_lib, cfg["lib_path"], file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
    ],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_name"]: ["data/*", "weights/*", "recipes/*", "bank/*", "web/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"lab": lab, "dev": lab + cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "vit_course.commands": cfg["commands"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": CarryFolders},
    zip_safe=False,
)
