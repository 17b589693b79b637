import { afterAll, describe, test } from "vitest";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import moe from "./moe.samples.ts";
import router from "./router.samples.ts";
import sampling from "./sample.samples.ts";
import { checkSample } from "./suite.ts";

// These ops share work among invocations in one way on software adapters and in another on hardware. A device
// that claims to be hardware shows that the second way computes the same, wherever the tests run.
const [handle] = await testAdapters();

describe(`${handle!.info.id}, arranged as for hardware`, async () => {
  const device = await openDevice({ adapter: { ...handle!, info: { ...handle!.info, isSoftware: false } } });
  afterAll(() => device.destroy());
  for (const spec of [...moe, ...router, ...sampling]) {
    describe(spec.op.opName, () => {
      for (const sample of spec.samples) test(sample.name, () => checkSample(device, spec, sample));
    });
  }
});
