import { afterAll, describe, test } from "vitest";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkSample, type OpSamples } from "./suite.ts";
const modules = import.meta.glob<{ default: OpSamples | OpSamples[] }>("./*.samples.ts", { eager: true });
const specs = Object.values(modules).flatMap((module) => module.default);
const [handle] = await testAdapters();
describe("flip", async () => {
  const device = await openDevice({ adapter: { ...handle!, info: { ...handle!.info, isSoftware: false } } });
  afterAll(() => device.destroy());
  for (const spec of specs) describe(spec.op.opName, () => { for (const s of spec.samples) test(s.name, () => checkSample(device, spec, s)); });
});
