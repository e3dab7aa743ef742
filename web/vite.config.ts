// Builds the page into one file, src/lapilli/serve/page.html, which the wheel carries.
//
// The file names the digest of its sources (lapilli-sources): tests/serve/test_page_file.py computes the same in
// Python, so that a change in web/ without a build is noticed where no Node is installed.

import { createHash } from "node:crypto";
import { copyFileSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";
import { viteSingleFile } from "vite-plugin-singlefile";

const HERE = import.meta.dirname;
const FILES = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"];

/** Return the digest of all sources: their names and texts, in the order of their names. */
function digest(): string {
  const names = [...FILES, ...readdirSync(join(HERE, "src")).map((name) => `src/${name}`)].sort();
  const hash = createHash("sha256");
  for (const name of names) {
    const text = readFileSync(join(HERE, name), "utf-8").replaceAll("\r\n", "\n");
    hash.update(`${name}\n${Buffer.byteLength(text)}\n${text}`);
  }
  return hash.digest("hex");
}

/** Return the licences that ask to go along with what is bundled. */
function licences(): string {
  const texts = ["preact/LICENSE", "marked/LICENSE"].map((name) =>
    readFileSync(join(HERE, "node_modules", name), "utf-8").replaceAll("--", "- -").trim(),
  );
  const purify = "DOMPurify, by Cure53 and other contributors, is used under the Apache License 2.0.";
  return `<!--\n${[...texts, purify].join("\n\n----------\n\n").replaceAll("--", "==")}\n-->`;
}

function page(): Plugin {
  return {
    name: "lapilli-page",
    transformIndexHtml: (html) =>
      html
        .replace("</title>", `</title>\n    <meta name="lapilli-sources" content="${digest()}">`)
        .replace("</body>", `</body>\n${licences()}`),
    writeBundle: () => copyFileSync(join(HERE, "dist/index.html"), join(HERE, "../src/lapilli/serve/page.html")),
  };
}

export default defineConfig({
  plugins: [page(), viteSingleFile()],
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: { target: ["chrome123", "firefox128", "safari17.5"], modulePreload: false, reportCompressedSize: false },
});
