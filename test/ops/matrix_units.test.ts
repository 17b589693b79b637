import { afterAll, describe, expect, test } from "vitest";
import { cast } from "../../src/ops/cast.ts";
import { product, type Product } from "../../src/ops/gemm.ts";
import { matrixUnit, productCandidates, type ProductKernel } from "../../src/ops/product_kernels.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { HalfDType, Tensor } from "../../src/tensor/tensor.ts";
import { randomTensor } from "../../src/tensor/trial.ts";
import { testAdapters } from "../support/adapters.ts";

// No adapter here has matrix units. One that claims their sizes runs the same kernel with the products of
// subgroup matrices written out, so what it stages, multiplies and stores is checked; the built-ins are not.
const [handle] = await testAdapters();
const [M, N, K] = [70, 74, 43];

async function claiming(...sizes: [M: number, N: number, K: number, component?: string][]): Promise<Device> {
  const subgroupMatrices = sizes.map(([M, N, K, componentType = "f32"]) =>
    ({ componentType, resultComponentType: "f32", M, N, K }));
  return openDevice({ adapter: { ...handle!, info: { ...handle!.info, subgroupMatrices } } });
}

type More = (make: (shape: number[]) => Tensor) => Partial<Product>;

const ENDS: readonly More[] = [
  () => ({}), (make) => ({ bias: make([N]), relu2: true }), (make) => ({ residual: make([M, N]) }),
];

/** The values of one product by a kernel. */
async function values(
  device: Device, kernel: ProductKernel, more: More, dtype?: HalfDType,
): Promise<Float32Array> {
  const c = scope(() => {
    const make = (shape: number[]) => randomTensor(device, shape, shape[0]);
    const [a, b] = [make([M, K]), make([K, N])].map((x) => dtype ? cast(x, dtype) : x) as [Tensor, Tensor];
    const out = device.zeros([M, N]);
    product({
      m: M, n: N, k: K, a: { tensor: a, row: K, col: 1 }, b: { tensor: b, row: N, col: 1 },
      c: { tensor: out, row: N }, kernel, ...more(make),
    });
    return out;
  });
  const found = await c.read() as Float32Array;
  c.dispose();
  return found;
}

function close(found: Float32Array, expected: Float32Array, tolerance: number): void {
  const largest = Math.max(...expected.map(Math.abs));
  expect(largest).toBeGreaterThan(1);
  const worst = Math.max(...expected.map((x, i) => Math.abs(x - found[i]!)));
  expect(worst / largest).toBeLessThan(tolerance);
}

describe(handle!.info.id, async () => {
  const devices = [
    await claiming([8, 8, 8]), await claiming([8, 16, 16], [8, 8, 8, "f16"]),
    await claiming([16, 8, 8], [16, 16, 8, "f16"]),
  ];
  afterAll(() => devices.forEach((device) => device.destroy()));

  for (const [i, device] of devices.entries()) {
    test(`factors in f32, sizes ${i + 1}`, async () => {
      const more = ENDS[i]!;
      close(await values(device, "matrix", more), await values(device, "tile", more), 2 ** -20);
    });

    test(`factors in f16, sizes ${i + 1}`, async () => {
      const plain = await values(device, "tile", () => ({}), "f16");
      close(await values(device, "matrix", () => ({}), "f16"), plain, 2 ** -20);
      close(await values(device, "matrix_large", () => ({}), "f16"), plain, 2 ** -20);
    });
  }

  test("the largest listed size of the right number format is taken, if the kernel can", async () => {
    const device = await claiming([8, 8, 8], [16, 16, 16], [16, 16, 32], [8, 8, 16, "f16"], [4, 4, 4, "f16"]);
    devices.push(device);
    const plain = { M: 16, N: 16, K: 16, f16: false };
    expect(matrixUnit(device, { a: "f32", b: "f32", c: "f32" })).toMatchObject(plain);
    const halves = matrixUnit(device, { a: "f16", b: "f16", c: "f32" });
    const hasF16 = device.gpuDevice.features.has("shader-f16");
    expect(halves).toMatchObject(hasF16 ? { M: 8, N: 8, K: 16, f16: true } : plain);
  });

  test("no adapter without the feature is offered the kernel", () => {
    for (const device of devices) {
      expect(matrixUnit(device, { a: "f16", b: "f16", c: "f32" }).native).toBe(false);
      const names = productCandidates(device, 4096, 4096, { a: "f16", b: "f16", c: "f32" });
      expect(names.filter((name) => name.startsWith("matrix"))).toEqual([]);
    }
  });
});
