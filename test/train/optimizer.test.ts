import { afterAll, describe, expect, test } from "vitest";
import * as ref from "../../src/reference/adamw.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { type NdArray, ndarray, sizeOf } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { together } from "../../src/tensor/together.ts";
import { AdamW } from "../../src/train/optimizer.ts";
import { Draw } from "../ops/suite.ts";
import { bitsOf } from "../support/state.ts";
import { testAdapters } from "../support/adapters.ts";

const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const SHAPES = [[7, 11], [3], [64, 40], [0, 4], [1], [129]];
const bytes = (size: number) => 256 * Math.ceil(size / 64);

describe("tensors side by side", () => {
  test("share a buffer, apart from each other, which is free with the last of them", async () => {
    const before = device.pool.liveBytes;
    const tensors = together(device, SHAPES);
    expect(new Set(tensors.map(({ storage }) => storage)).size).toBe(1);
    let at = 0;
    tensors.forEach(({ shape, size, byteOffset }, i) => {
      expect([shape, byteOffset]).toEqual([SHAPES[i], at]);
      at += bytes(size);
    });
    tensors.forEach((tensor, i) => tensor.write(new Float32Array(tensor.size).fill(i)));
    for (const [i, tensor] of tensors.entries()) {
      expect(await tensor.read()).toEqual(new Float32Array(tensor.size).fill(i));
    }
    for (const tensor of tensors.slice(1)) tensor.dispose();
    expect(device.pool.liveBytes).toBeGreaterThan(before);
    tensors[0]!.dispose();
    expect(device.pool.liveBytes).toBe(before);
  });

  test("take another buffer where one would be too large to bind", () => {
    const size = device.pool.largestBytes >= 2 ** 27 ? 2 ** 24 : Math.floor(device.pool.largestBytes / 8);
    const tensors = scope(() => together(device, [[size], [size], [5], [size]])
      .map(({ storage, byteOffset }) => ({ storage, byteOffset })));
    const buffers = [...new Set(tensors.map(({ storage }) => storage))];
    expect(tensors.map(({ storage, byteOffset }) => [buffers.indexOf(storage), byteOffset]))
      .toEqual([[0, 0], [0, 4 * size], [1, 0], [1, 256]]);
    device.pool.trim();
  });

  test("are found by a range that starts where a binding may", () => {
    scope(() => {
      const whole = device.zeros([130]);
      expect(whole.range(128, [2])).toMatchObject({ byteOffset: 512, size: 2, storage: whole.storage });
      expect(() => whole.range(1, [2])).toThrow(/range.*multiple of 64.*from 1/);
      expect(() => whole.range(128, [3])).toThrow(/range: expected \[3\].*\[130\]/);
      const halves = device.zeros([260], "bf16");
      expect(halves.range(128, [5])).toMatchObject({ byteOffset: 256, size: 5, storage: halves.storage });
      expect(() => halves.range(64, [2])).toThrow(/range.*multiple of 128.*from 64/);
    });
  });
});

/** Two updates by the definition and on the device; the gradient of parameter 4 is missing. */
async function check(make: () => Tensor[]): Promise<void> {
  const before = device.pool.liveBytes;
  const tensors = make();
  const names = SHAPES.map((_, i) => `p${i}`);
  const options = {
    betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1,
    decays: (name: string) => Number(name[1]) % 2 === 0,
  } as const;
  const optimizer = new AdamW(new Map(names.map((name, i) => [name, tensors[i]!])), options);
  const entries = names.flatMap((name) => [`m.${name}`, `v.${name}`]);
  expect(optimizer.state.map(({ name }) => name)).toEqual(entries);
  const r = new Draw(3);
  const expected = SHAPES.map((shape, i) => {
    const values = r.normal(shape);
    tensors[i]!.write(Float32Array.from(values.data));
    return [values, ndarray(shape), ndarray(shape)] as const;
  });
  const [beta1, beta2] = options.betas.map(Math.fround) as [number, number];
  for (let step = 0; step < 2; step++) {
    const gradients = SHAPES.map((shape, i) => r.normal(shape, i === 4 ? 0 : 0.1));
    const norm = Math.sqrt(gradients.flatMap(({ data }) => [...data]).reduce((sum, x) => sum + x * x, 0));
    optimizer.prepare(step, 0.01);
    const { norm: found, scale } = scope(() =>
      optimizer.update(new Map(gradients.flatMap((gradient, i) => i === 4 ? [] : [
        [tensors[i]!.key, device.tensor(Float32Array.from(gradient.data), [gradient.data.length])] as const,
      ]))));
    expect(Math.abs(await found.item() / norm - 1)).toBeLessThan(1e-6);
    found.dispose();
    scale.dispose();
    const hyper = [0.01, beta1, beta2, 1e-8, 0.1, 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1), 0];
    for (const [i, shape] of SHAPES.entries()) {
      // The definition works on whole vectors.
      const padded = [expected[i]![0], gradients[i]!, expected[i]![1], expected[i]![2]].map(({ data }) => {
        const whole = ndarray([4 * Math.ceil(sizeOf(shape) / 4)]);
        whole.data.set(data);
        return whole;
      }) as [NdArray, NdArray, NdArray, NdArray];
      const table = ndarray([1, 3], [0, padded[0].data.length / 4, i % 2 === 0 ? 1 : 0]);
      const updated = ref.adamw(...padded, table, ndarray([8], hyper), ndarray([1], [1 / (norm + 1e-6)]));
      updated.forEach(({ data }, j) => expected[i]![j]!.data.set(data.subarray(0, sizeOf(shape))));
      for (const [j, view] of [tensors[i]!, ...optimizer.state.slice(2 * i, 2 * i + 2)].entries()) {
        const values = new Float32Array((await bitsOf(view)).buffer);
        expected[i]![j]!.data.forEach((value, at) =>
          expect(Math.abs(values[at]! - value), `${names[i]} ${j} ${at}`).toBeLessThan(2e-6));
      }
    }
  }
  for (const tensor of tensors) tensor.dispose();
  optimizer.dispose();
  expect(device.pool.liveBytes).toBe(before);
}

test("an update with a gradient or a loss that is no number leaves all as it was", async () => {
  const [parameter] = together(device, [[5, 3]]);
  const optimizer = new AdamW(new Map([["p", parameter!]]), {
    betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: Infinity,
  });
  parameter!.write(Float32Array.from({ length: 15 }, (_, i) => i));
  const state = async () => {
    const values: number[][] = [];
    for (const view of [parameter!, ...optimizer.state]) {
      values.push([...new Float32Array((await bitsOf(view)).buffer)]);
    }
    return values;
  };
  const update = async (gradient: number, loss: number) => {
    optimizer.prepare(0, 0.01);
    const { norm, scale } = scope(() => {
      const values = new Float32Array(15).fill(0.5).with(7, gradient);
      return optimizer.update(
        new Map([[parameter!.key, device.tensor(values, [15])]]), device.tensor([loss], []));
    });
    const factor = await scale.item();
    for (const tensor of [norm, scale]) tensor.dispose();
    return factor;
  };
  expect(await update(0.5, 2)).toBe(1);
  const before = await state();
  expect(before[1]![7]).toBeCloseTo(0.05, 6);
  for (const bad of [NaN, Infinity, -Infinity]) {
    expect(await update(bad, 2), `gradient ${bad}`).toBe(-1);
    expect(await update(0.5, bad), `loss ${bad}`).toBe(-1);
    expect(await state()).toEqual(before);
  }
  expect(await update(0.5, 2)).toBe(1);
  expect((await state())[1]).not.toEqual(before[1]);
  optimizer.dispose();
  parameter!.dispose();
});

describe("an update follows the definition, and a parameter without a gradient decays", () => {
  test("for parameters side by side", () => check(() => together(device, SHAPES)));
  test("for parameters in buffers of their own", () =>
    check(() => SHAPES.map((shape) => device.zeros(shape))));
  test("for parameters side by side in another order, and one elsewhere", () => check(() => {
    const [first, ...others] = together(device, SHAPES.toReversed()).toReversed();
    first!.dispose();
    return [device.zeros(SHAPES[0]!), ...others];
  }));
});
