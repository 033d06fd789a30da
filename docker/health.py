"""Exit status 0 when the server in this container answers."""

import os
import sys
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('PORT', '30000')}/health"
try:
    with urllib.request.urlopen(url, timeout=25) as answer:
        sys.exit(answer.status != 200)
except OSError as error:
    sys.exit(f"{url}: {error}")
