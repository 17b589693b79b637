import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { ROOT } from "../support/imports.ts";

const WIDEST = 110;
const FOLDERS = ["src", "test", "demo", "bench", "."];
const GENERATED = ["src/kernel/manifest.ts"];

test(`no line of TypeScript or JavaScript is wider than ${WIDEST} columns`, () => {
  const files = FOLDERS.flatMap((folder) =>
    readdirSync(join(ROOT, folder), { recursive: folder !== ".", encoding: "utf8" })
      .map((name) => join(folder, name).replaceAll("\\", "/"))
      .filter((name) => /\.m?[tj]s$/.test(name) && !name.includes("node_modules")));
  expect(files.length).toBeGreaterThan(200);
  const wide = files.filter((name) => !GENERATED.includes(name)).flatMap((name) =>
    readFileSync(join(ROOT, name), "utf8").split("\n").flatMap((line, i) =>
      line.length > WIDEST ? [`${name}:${i + 1} has ${line.length} columns`] : []));
  expect(wide).toEqual([]);
});
