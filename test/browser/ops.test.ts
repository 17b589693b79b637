import { expect, test } from "vitest";
import { type OpSamples, samplesOn } from "../ops/suite.ts";
import { runInPage, withPage } from "./chromium.ts";
import type { OpsResult } from "./ops.page.ts";

type Samples = { default: OpSamples | OpSamples[] };
const modules = import.meta.glob<Samples>("../ops/*.samples.ts", { eager: true });
const specs = Object.values(modules).flatMap((module) => module.default);
const total = (counts: number[]) => counts.reduce((a, b) => a + b, 0);

test("every sample of every op passes in a page", { timeout: 300_000 }, async () => {
  const result = await withPage((page, url) => runInPage<OpsResult>(page, url, "test/browser/ops.page.ts"));
  expect(result.failures).toEqual([]);
  expect(result.samples).toBe(total(specs.map((spec) => samplesOn(result.adapter, spec).length)));
  expect(result.refusals).toBe(total(specs.map((spec) => spec.errors?.length ?? 0)));
  expect(result.samples).toBeGreaterThan(100);
});
