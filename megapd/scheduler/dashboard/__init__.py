"""The web page: mounted on the service at /, where nothing needs a token; its data comes from /v1, which does."""

from megapd.scheduler.dashboard import data, page

ROUTERS = (data.routes, page.routes)

__all__ = ["ROUTERS"]
