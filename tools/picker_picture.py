"""Write docs/how-to/picker.png: the page of `opendelta pick` on a small BERT, in Debian's Chromium.

python tools/picker_picture.py [FILE [WIDTH HEIGHT [dark]]]
"""

import sys
import threading
import time
from pathlib import Path

import torch
import transformers

import opendelta
from opendelta._picker import session

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))


def picture(file: Path, width: int, height: int, dark: bool) -> None:
    """Open the page with two deltas on it, and write what it shows."""
    from support.browser import chromium

    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig())
    start = [opendelta.LoraConfig(lora_r=16), opendelta.AdapterConfig(modified_modules=["query"])]
    addresses: list[str] = []
    session._announce = lambda address, browser: addresses.append(address)
    threading.Thread(target=session.pick, args=(model, start), daemon=True).start()
    browser = chromium(width, height, dark)
    try:
        while not addresses:
            time.sleep(0.1)
        browser.get(addresses[0])
        while not browser.find_elements("css selector", ".row.at [class^=mark]"):
            time.sleep(0.1)
        time.sleep(1)
        browser.save_screenshot(str(file))
    finally:
        browser.quit()


if __name__ == "__main__":
    given = sys.argv[1:]
    size = (int(given[1]), int(given[2])) if len(given) > 2 else (1280, 800)
    file = Path(given[0]) if given else ROOT / "docs" / "how-to" / "picker.png"
    picture(file, *size, "dark" in given)
