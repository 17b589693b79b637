import { expect, test } from "vitest";
import { adamw, MOMENT_DTYPES, type MomentFormat, stretchTable } from "../../src/ops/adamw.ts";
import * as ref from "../../src/reference/adamw.ts";
import type { Device } from "../../src/tensor/device.ts";
import { type NdArray, ndarray } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { onEveryAdapter } from "../support/devices.ts";
import { Draw } from "./suite.ts";

const SIZE = 64 * 40 + 20;
const SEED = 7;
const f32 = ({ data }: NdArray) => Float32Array.from(data);

/** A state some way into a run, with moments of very different sizes in every block. */
function state() {
  const r = new Draw(5);
  const spread = r.uniform([SIZE], -6, 0);
  const drawn = (scale: (i: number) => number) => ndarray([SIZE], Array.from(r.normal([SIZE]).data, (x, i) =>
    Math.fround(x * scale(i))));
  const m = drawn((i) => 10 ** spread.data[i]!);
  const v = ndarray([SIZE], Array.from(drawn((i) => 10 ** spread.data[i]!).data, (x) => Math.fround(x * x)));
  return { param: drawn(() => 1), grad: drawn((i) => 10 ** spread.data[i]!), m, v };
}

const hyperOf = (step: number, lr = 3e-3) => {
  const [beta1, beta2] = [Math.fround(0.9), Math.fround(0.95)];
  return [lr, beta1, beta2, 1e-8, 0, 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1), step];
};

interface Stored {
  readonly param: Tensor;
  readonly m: Tensor;
  readonly v: Tensor;
  readonly low: Tensor | null;
}

/** One update of everything. */
function update(
  device: Device, { param, m, v, low }: Stored, grad: NdArray, hyper: number[], seed = SEED,
): void {
  scope(() => {
    const table = stretchTable(device, [{ first: 0, size: SIZE, decays: false }]);
    adamw(param, device.tensor(f32(grad), [SIZE]), m, v, table, device.tensor(hyper, [8]),
      device.tensor([1], [1]), low, { seed, stream: 3 });
  });
}

function stored(device: Device, values: NdArray, format: MomentFormat, moment: "m" | "v"): Tensor {
  if (format !== "8bit") return device.tensor(f32(values), [SIZE], MOMENT_DTYPES[format]);
  const words = ref.encodeMoments(values, moment, { seed: 1, stream: 1, step: 1 });
  return device.tensor(Uint32Array.from(words.data), words.shape);
}

async function decoded(tensor: Tensor, moment: "m" | "v"): Promise<NdArray> {
  const values = ndarray(tensor.shape, Float64Array.from(await tensor.read()));
  return tensor.dtype === "u32" ? ref.decodeMoments(values, SIZE, moment) : values;
}

await onEveryAdapter((device) => {
  test.each(["bf16", "8bit"] as const)("moments of %s are those of float64, rounded to a neighbour", async (
    format) => {
    const given = state();
    const tensors = {
      param: device.tensor(f32(given.param), [SIZE]), low: null,
      m: stored(device, given.m, format, "m"), v: stored(device, given.v, format, "v"),
    };
    const [m, v] = [await decoded(tensors.m, "m"), await decoded(tensors.v, "v")];
    const hyper = hyperOf(20);
    update(device, tensors, given.grad, hyper);
    const plain = ref.adamw(given.param, given.grad, m, v, ndarray([1, 3], [0, SIZE / 4, 0]),
      ndarray([8], hyper), ndarray([1], [1])) as [NdArray, NdArray, NdArray];
    (await tensors.param.read()).forEach((value, i) => {
      // The step itself may be large where v is small: it is right to a few parts in a million.
      const step = Math.abs(plain[0].data[i]! - given.param.data[i]!);
      expect(Math.abs(value - plain[0].data[i]!), `${i}`).toBeLessThan(5e-7 + 4e-6 * step);
    });
    for (const [moment, expected] of [["m", plain[1]], ["v", plain[2]]] as const) {
      const found = await decoded(tensors[moment], moment);
      const key = { seed: SEED, stream: 3, step: 20 };
      const same = format === "8bit"
        ? ref.decodeMoments(ref.encodeMoments(expected, moment, key), SIZE, moment).data
        : null;
      let others = 0;
      let bias = 0;
      let total = 0;
      expected.data.forEach((value, i) => {
        const error = found.data[i]! - value;
        bias += error;
        total += Math.abs(error);
        if (format === "bf16") expect(Math.abs(error), `${i}`).toBeLessThanOrEqual(2 ** -7 * Math.abs(value));
        else if (Math.abs(found.data[i]! - same![i]!) > 1e-5 * Math.abs(same![i]!)) others++;
      });
      // A value that arithmetic moves across its threshold is rounded to the other side: rare.
      expect(others).toBeLessThan(SIZE / 100);
      // Errors of single elements cancel out; v is held above zero, which the smallest of a block feel.
      expect(Math.abs(bias) / total).toBeLessThan(0.2);
    }
    for (const tensor of [tensors.param, tensors.m, tensors.v]) tensor.dispose();
  });

  test("bf16 parameters with masters are f32 parameters to the bit, and those rounded", async () => {
    const given = state();
    const start = device.tensor(f32(given.param), [SIZE], "bf16");
    const make = (param: Tensor, low: Tensor | null): Stored =>
      ({ param, low, m: device.tensor(f32(given.m), [SIZE]), v: device.tensor(f32(given.v), [SIZE]) });
    const whole = make(device.tensor(await start.read() as Float32Array, [SIZE]), null);
    const halves = make(start, device.zeros([SIZE / 2], "u32"));
    const r = new Draw(9);
    for (let step = 0; step < 6; step++) {
      const grad = r.normal([SIZE], 0.01);
      for (const each of [whole, halves]) update(device, each, grad, hyperOf(step));
    }
    const bits = new Uint32Array(await device.readBytes(whole.param));
    const upper = new Uint16Array(await device.readBytes(halves.param));
    const lower = new Uint16Array(await device.readBytes(halves.low!));
    const carried = new Set<boolean>();
    bits.forEach((word, i) => {
      const up = lower[i]! >>> 15;
      carried.add(up === 1);
      expect((((upper[i]! - up) << 16) | lower[i]!) >>> 0, `${i}`).toBe(word);
    });
    expect(carried.size).toBe(2);
    for (const each of [whole, halves]) for (const tensor of Object.values(each)) tensor?.dispose();
  });

  test("without masters steps far below the last place add up, by bits of seed and step", async () => {
    const run = async (seed: number, steps: number, first = 0) => {
      const zeros = () => device.zeros([SIZE]);
      const each = {
        param: device.tensor(new Float32Array(SIZE).fill(1.5), [SIZE], "bf16"), m: zeros(), v: zeros(),
        low: null,
      };
      for (let step = first; step < first + steps; step++) {
        update(device, each, ndarray([SIZE], new Float64Array(SIZE).fill(1)), hyperOf(step, 2 ** -11), seed);
      }
      const values = [...await each.param.read()];
      for (const tensor of [each.param, each.m, each.v]) tensor.dispose();
      return values;
    };
    const first = await run(SEED, 1);
    // The last place is 2^-7, a step 2^-11: to the nearest, nothing would ever move.
    const moved = first.filter((value) => value !== 1.5);
    expect(new Set(moved)).toEqual(new Set([1.5 - 2 ** -7]));
    const deviation = Math.sqrt(SIZE * (1 / 16) * (15 / 16));
    expect(Math.abs(moved.length - SIZE / 16)).toBeLessThan(4 * deviation);
    expect(await run(SEED, 1)).toEqual(first);
    expect(await run(SEED + 1, 1)).not.toEqual(first);
    const late = await run(SEED, 40);
    const mean = late.reduce((sum, value) => sum + value, 0) / SIZE;
    expect(Math.abs(1.5 - mean - 40 * 2 ** -11)).toBeLessThan(0.05 * 40 * 2 ** -11);
  });
});
