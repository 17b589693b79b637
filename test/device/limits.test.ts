import { expect, test } from "vitest";
import { OutOfMemoryError } from "../../src/gpu/errors.ts";
import { checkSample, type OpSamples } from "../ops/suite.ts";
import { onEveryAdapter } from "../support/devices.ts";

/** What WebGPU guarantees everywhere. */
const GUARANTEED = {
  maxBufferSize: 2 ** 28, maxStorageBufferBindingSize: 2 ** 27, maxStorageBuffersPerShaderStage: 8,
  maxComputeWorkgroupStorageSize: 16384, maxComputeInvocationsPerWorkgroup: 256,
} as const;

type Samples = { default: OpSamples | OpSamples[] };
const modules = import.meta.glob<Samples>("../ops/*.samples.ts", { eager: true });
const specs = Object.values(modules).flatMap((module) => module.default);

await onEveryAdapter((_, open) => {
  const opening = open({ limits: "default" });

  test("a device at WebGPU's default limits has just these, and no optional feature", async () => {
    const device = await opening;
    for (const [name, value] of Object.entries(GUARANTEED)) {
      expect(device.gpuDevice.limits[name as keyof typeof GUARANTEED], name).toBe(value);
    }
    expect(device.hasSubgroups).toBe(false);
    expect(device.profile()).toBeNull();
  });

  for (const spec of specs) {
    test(`${spec.op.opName} runs on it`, async () => checkSample(await opening, spec, spec.samples[0]!));
  }

  test("an allocation above the largest binding is an OutOfMemoryError, one below it is not", async () => {
    const device = await opening;
    const largest = GUARANTEED.maxStorageBufferBindingSize;
    let error: unknown = null;
    try {
      device.empty([largest / 4 + 1]);
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toBeInstanceOf(OutOfMemoryError);
    expect(error).toMatchObject({ requestedBytes: largest + 4, availableBytes: largest });
    const tensor = device.empty([largest / 4]);
    tensor.dispose();
    device.pool.trim();
    await device.finish();
  });
});
