import { afterAll, describe, test } from "vitest";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkSample, type OpSamples } from "./suite.ts";

// Ops share work among invocations in one way on software adapters and in another on hardware. A device
// that claims to be hardware shows that the second way computes the same, wherever the tests run.
const [handle] = await testAdapters();
const modules = import.meta.glob<{ default: OpSamples | OpSamples[] }>("./*.samples.ts", { eager: true });
const specs = Object.values(modules).flatMap((module) => module.default);

describe(`${handle!.info.id}, arranged as for hardware`, async () => {
  const device = await openDevice({ adapter: { ...handle!, info: { ...handle!.info, isSoftware: false } } });
  afterAll(() => device.destroy());
  for (const spec of specs) {
    describe(spec.op.opName, () => {
      // SwiftShader compiles a tile kernel for ten seconds: one sample per op will do there.
      const samples = handle!.info.id === "swiftshader" ? spec.samples.slice(0, 1) : spec.samples;
      for (const sample of samples) test(sample.name, () => checkSample(device, spec, sample));
    });
  }
});
