import { afterAll, describe, expect, test } from "vitest";
import { launchObservers } from "../../src/kernel/launch.ts";
import { manifest } from "../../src/kernel/manifest.ts";
import { registry } from "../../src/ops/index.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkError, checkSample, type OpSamples, samplesOn } from "./suite.ts";

const modules = import.meta.glob<{ default: OpSamples | OpSamples[] }>("./*.samples.ts", { eager: true });
const specs = Object.values(modules).flatMap((module) => module.default);
const adapters = await testAdapters();

const reached = new Set<string>();
launchObservers.add((kernel, entry) => reached.add(`${kernel}:${entry}`));

for (const handle of adapters) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());
    for (const spec of specs) {
      describe(spec.op.opName, () => {
        for (const sample of samplesOn(handle.info.id, spec)) {
          test(sample.name, () => checkSample(device, spec, sample));
        }
        for (const error of spec.errors ?? []) test(`refuses ${error.name}`,
          () => checkError(device, spec, error));
      });
    }
  });
}

describe("completeness", () => {
  test("every registered op has samples", () => {
    const sampled = new Set(specs.map((spec) => spec.op.opName));
    expect([...registry.keys()].filter((name) => !sampled.has(name))).toEqual([]);
  });

  test("every kernel entry was reached by a sample", () => {
    const all = Object.entries(manifest as Record<string, { entries: Record<string, unknown> }>)
      .flatMap(([kernel, { entries }]) => Object.keys(entries).map((entry) => `${kernel}:${entry}`));
    expect(all.filter((entry) => !reached.has(entry))).toEqual([]);
  });
});
