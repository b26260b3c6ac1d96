from setuptools import find_packages, setup

# The folders kernels/, launch/ and configs/ stand at the top of the repository and are imported below megapd.
# No top-level package may be called `kernels`: a distribution of that name exists and transformers looks for it.
mapped = {"megapd.kernels": "kernels", "megapd.launch": "launch", "megapd.configs": "configs"}

setup(
    packages=[*find_packages(include=["megapd", "megapd.*"]), *mapped],
    package_dir={"megapd": "megapd", **mapped},
    package_data={"megapd.configs": ["*.yaml", "*/*.yaml", "*/*.json"], "megapd.schedule.dashboard": ["static/*"]},
)
