"""Models and what stands on them: loading and quantization, scalar heads, adapters, the likelihood of tokens."""

import logging

# bitsandbytes reports every cast and every kernel it could be faster with; what fails raises.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
