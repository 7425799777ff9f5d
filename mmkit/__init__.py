"""mmkit: image–text fusion, learnt by building it. The public names stand in `__init__.pyi`, grouped by lesson; each
module is imported when one of its names is first used, so that what needs no torch starts at once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
