"""Flask's shape: one argument, and whatever Flask accepts as an answer."""


def handle(request):
    return {"name": request.args.get("name", "nobody"), "method": request.method}, 201, {"X-Made-By": "flask-style"}
