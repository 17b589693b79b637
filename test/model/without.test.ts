/** Adapters that lack one thing each: logits, loss and every gradient are those of any other adapter. */
import { fileURLToPath } from "node:url";
import { expect, onTestFinished, test, vi } from "vitest";
import { GpuError } from "../../src/gpu/errors.ts";
import { openFolder } from "../../src/io/files.node.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { onEveryAdapter } from "../support/devices.ts";
import { checkGoldenCase } from "./golden.ts";

const golden = (name: string) =>
  openFolder(fileURLToPath(new URL(`../fixtures/golden/${name}`, import.meta.url)));
const FEATURES = ["shader-f16", "subgroups", "timestamp-query"];
const MEMORY = "maxComputeWorkgroupStorageSize";

await onEveryAdapter((device, open) => {
  const { features, limits } = device.gpuDevice;
  const names = [...FEATURES.filter((name) => features.has(name)), ...limits[MEMORY] > 16384 ? [MEMORY] : []];

  for (const name of names) {
    test(`without ${name} a model computes the same`, async () => {
      const bare = await open({ without: [name] });
      expect(FEATURES.filter((each) => bare.gpuDevice.features.has(each)))
        .toEqual(FEATURES.filter((each) => features.has(each) && each !== name));
      expect(bare.gpuDevice.limits[MEMORY]).toBe(name === MEMORY ? 16384 : limits[MEMORY]);
      // `packed` has all kinds of blocks, and documents. SwiftShader compiles their kernels without subgroups
      // for half a minute; all of them run there in test/device/limits.test.ts.
      const isSlow = name === "subgroups" && device.info.id === "swiftshader";
      const { compared, failures } = await checkGoldenCase(bare, golden(isSlow ? "mamba_only" : "packed"));
      expect(failures).toEqual([]);
      expect(compared).toBeGreaterThan(5);
      bare.destroy();
    });
  }

  test("what nobody asks for cannot be left out", async () => {
    await expect(open({ without: ["subgroup"] })).rejects.toThrow(GpuError);
    await expect(open({ without: ["subgroup"] }))
      .rejects.toThrow(/without shader-f16, subgroups, .*, but not without "subgroup"/);
  });
});

test("KRAIT_WITHOUT names what every device is opened without, unless the caller does", async () => {
  vi.stubEnv("KRAIT_WITHOUT", "timestamp-query, subgroups");
  onTestFinished(() => void vi.unstubAllEnvs());
  const stripped = await openDevice();
  for (const name of FEATURES.slice(1)) expect(stripped.gpuDevice.features.has(name), name).toBe(false);
  stripped.destroy();
  const whole = await openDevice({ without: [] });
  expect(whole.hasSubgroups).toBe(true);
  whole.destroy();
});
