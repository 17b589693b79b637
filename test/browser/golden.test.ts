import { readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import type { GoldenResult } from "../model/golden.ts";
import { runInPage, withPage } from "./chromium.ts";

const cases = readdirSync(fileURLToPath(new URL("../fixtures/golden", import.meta.url))).sort();

test("every golden case holds in a page", { timeout: 180_000 }, async () => {
  const results = await withPage((page, url) =>
    runInPage<Record<string, GoldenResult>>(page, url, "test/browser/golden.page.ts", cases));
  const failures = Object.entries(results).flatMap(([name, result]) => result.failures.map((each) => `${name}: ${each}`));
  expect(failures).toEqual([]);
  expect(Object.keys(results)).toEqual(cases);
  expect(cases.length).toBeGreaterThan(10);
  for (const [name, { compared }] of Object.entries(results)) expect(compared, name).toBeGreaterThan(5);
});
