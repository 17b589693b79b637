import { readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import type { GoldenResult } from "../model/golden.ts";
import { runInPage, withPage } from "./chromium.ts";

const root = fileURLToPath(new URL("../fixtures/golden", import.meta.url));
const cases = Object.fromEntries(readdirSync(root).map((name) => [name, readdirSync(join(root, name))]));

test("every golden case holds in a page", { timeout: 180_000 }, async () => {
  const results = await withPage((page, url) =>
    runInPage<Record<string, GoldenResult>>(page, url, "test/browser/golden.page.ts", cases));
  const all = Object.entries(results);
  expect(all.flatMap(([name, { failures }]) => failures.map((each) => `${name}: ${each}`))).toEqual([]);
  expect(Object.keys(results).sort()).toEqual(Object.keys(cases).sort());
  expect(all.length).toBeGreaterThan(10);
  expect(all.filter(([, { compared }]) => compared <= 5).map(([name]) => name)).toEqual([]);
});
