#!/bin/sh
# Put the client libraries into an environment of their own; what cannot be reached is left out, and
# the tests that need it say so. Usage: install.sh FOLDER
folder=$1
here=$(dirname "$0")
lock=$here/../../../locks/clients.txt
mkdir -p "$folder/node"

if ! cmp -s "$lock" "$folder/.installed"; then
    rm -f "$folder/.installed"
    "${PYTHON:-python3}" -m venv "$folder" &&
        "$folder/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile \
            --requirement "$lock" &&
        cp "$lock" "$folder/.installed" ||
        echo "make clients: no clients in Python, their tests will skip"
fi

if ! cmp -s "$here/package-lock.json" "$folder/node/.installed"; then
    rm -f "$folder/node/.installed"
    cp "$here/package.json" "$here/package-lock.json" "$folder/node" &&
        (cd "$folder/node" && npm ci --silent --no-audit --no-fund --ignore-scripts) &&
        cp "$here/package-lock.json" "$folder/node/.installed" ||
        echo "make clients: no clients in JavaScript, their tests will skip"
fi
exit 0
