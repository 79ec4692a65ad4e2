"""A real Chromium: Debian's, driven by selenium. Without one its tests are skipped by name."""

import os
import shutil

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDED = os.environ.get("OPENDELTA_BROWSER") == "needed"  # CI sets it: there a skip is a failure
MISSING = "chromium and chromedriver, such as Debian's packages chromium and chromium-driver"


def chromium(width=1280, height=860, dark=False):
    """A new Chromium with a window of this size; skip the test if there is none."""
    if CHROMIUM is None or DRIVER is None:
        assert not NEEDED, f"OPENDELTA_BROWSER=needed, but there is no {MISSING}"
        pytest.skip(f"needs {MISSING}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    return browser
