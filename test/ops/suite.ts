/**
 * The op suite: one body for every op, sample and adapter.
 * It knows nothing of the test runner, so that a page can run it.
 */
import { Tape } from "../../src/autograd/tape.ts";
import type { Op } from "../../src/ops/op.ts";
import type { Device } from "../../src/tensor/device.ts";
import { type NdArray, ndarray, sizeOf } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import { decodeFloat32, encodeFloat } from "../../src/tensor/dtype.ts";
import { type HalfDType, isFloat, Tensor, type TensorDType } from "../../src/tensor/tensor.ts";

/** An NdArray that becomes a tensor of this dtype on the device. */
export interface HostTensor extends NdArray {
  readonly dtype: TensorDType;
}

/** Draws sample arguments; the same draws for the same seed. */
export class Draw {
  #state: number;
  constructor(seed: number) {
    this.#state = seed >>> 0;
  }
  /** A number in [0, 1). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }
  #fill(shape: readonly number[], dtype: TensorDType, value: () => number): HostTensor {
    const data = Float64Array.from({ length: sizeOf(shape) }, value);
    return { shape: [...shape], data: dtype === "f32" ? data.map(Math.fround) : data, dtype };
  }
  /** Normal values of mean 0. */
  normal(shape: readonly number[], deviation = 1): HostTensor {
    return this.#fill(shape, "f32", () =>
      deviation * Math.sqrt(-2 * Math.log(1 - this.next())) * Math.cos(2 * Math.PI * this.next()));
  }
  uniform(shape: readonly number[], low = 0, high = 1): HostTensor {
    return this.#fill(shape, "f32", () => low + (high - low) * this.next());
  }
  /** Whole numbers from low to high - 1. */
  integers(shape: readonly number[], low: number, high: number, dtype: "i32" | "u32" = "i32"): HostTensor {
    return this.#fill(shape, dtype, () => low + Math.floor((high - low) * this.next()));
  }
  /** The same values rounded to f16 or bf16, and stored so. */
  half(host: HostTensor, dtype: HalfDType): HostTensor {
    const file = dtype === "f16" ? "F16" : "BF16";
    const data = Float64Array.from(decodeFloat32(file, encodeFloat(file, host.data as Float64Array)));
    return { shape: host.shape, data, dtype };
  }
  /** Given values. */
  of(shape: readonly number[], values: readonly number[], dtype: TensorDType = "f32"): HostTensor {
    let i = 0;
    return this.#fill(shape, dtype, () => values[i++]!);
  }
}

export interface Sample {
  readonly name: string;
  readonly args: (r: Draw) => unknown[];
  /** Length of the longest sum, for the tolerance; default 64. */
  readonly reduction?: number;
  /** Tolerance relative to the largest entry, instead of the derived one; gradients four times that. */
  readonly tolerance?: number;
}

export interface OpSamples {
  readonly op: Op;
  /** float64 forward: the op's arguments, NdArrays for tensors. */
  readonly reference: (...args: never[]) => unknown;
  /** float64 gradients: one per output, then the op's arguments. */
  readonly vjp?: (grads: (NdArray | null)[], ...args: never[]) => (NdArray | null | undefined)[];
  readonly samples: readonly Sample[];
  /** A feature without which a device must refuse the op. */
  readonly needs?: GPUFeatureName;
  /** The forward rounds and the gradient looks through it, so that no central difference shows it. */
  readonly straightThrough?: boolean;
  readonly errors?: readonly { name: string; args: (r: Draw) => unknown[]; message: RegExp }[];
}

/**
 * Declares the samples of one op. The op's own types are not repeated here:
 * a wrong argument fails when it runs.
 */
export function opSamples(spec: {
  op: unknown; reference: unknown; vjp?: unknown; samples: readonly Sample[]; straightThrough?: boolean;
  needs?: GPUFeatureName; errors?: OpSamples["errors"];
}): OpSamples {
  return spec as OpSamples;
}

/**
 * The samples of an op to run on an adapter: all of them, but SwiftShader compiles a kernel of workgroup
 * tiles for ten seconds, so there the first that asks for a kernel of that name will do.
 */
export function samplesOn(adapterId: string, { samples }: OpSamples): readonly Sample[] {
  if (adapterId !== "swiftshader") return samples;
  const asked = new Set<string>();
  return samples.filter(({ args }) => {
    const kernels = args(new Draw(1)).flatMap((arg) =>
      typeof arg === "object" && arg !== null && "kernel" in arg ? [String(arg.kernel)] : []);
    const tile = kernels.find((kernel) => /tile|matrix/.test(kernel));
    if (tile === undefined) return true;
    if (asked.has(tile)) return false;
    asked.add(tile);
    return true;
  });
}

type Argument = unknown;
const isHost = (value: unknown): value is HostTensor =>
  typeof value === "object" && value !== null && "dtype" in value && "data" in value;

/** Replaces host tensors by `f` of them, in arrays and plain objects too. */
export function mapTensors(value: Argument, f: (host: HostTensor) => unknown): unknown {
  if (isHost(value)) return f(value);
  if (Array.isArray(value)) return value.map((item) => mapTensors(item, f));
  if (typeof value === "object" && value !== null) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, mapTensors(item, f)]));
  }
  return value;
}

export function upload(device: Device, host: HostTensor): Tensor {
  const array = isFloat(host.dtype) ? Float32Array : host.dtype === "i32" ? Int32Array : Uint32Array;
  return device.tensor(array.from(host.data), host.shape, host.dtype);
}

async function download(tensor: Tensor): Promise<NdArray> {
  return ndarray(tensor.shape, Float64Array.from(await tensor.read()));
}

export function defaultTolerance(reduction: number): number {
  return 8 * Math.sqrt(reduction) * 2 ** -24;
}

/** Throws unless shapes are equal and every entry is within `tolerance` of the largest expected one. */
export function compare(
  what: string, found: NdArray, expected: NdArray, tolerance: number, exact = false,
): void {
  if (found.shape.join() !== expected.shape.join()) {
    throw new Error(`${what}: expected shape [${expected.shape}], found [${found.shape}]`);
  }
  let largest = 0;
  for (const value of expected.data) if (Number.isFinite(value)) largest = Math.max(largest, Math.abs(value));
  let worst = 0;
  let at = -1;
  expected.data.forEach((value, i) => {
    const got = found.data[i]!;
    const error = Object.is(value, got) || value === got ? 0 : Math.abs(value - got);
    if (!(error <= worst)) {
      worst = error;
      at = i;
    }
  });
  const allowed = exact ? 0 : tolerance * Math.max(largest, 1e-30);
  if (!(worst <= allowed)) {
    throw new Error(
      `${what}: entry ${at} of [${expected.shape}] is ${found.data[at]}, expected ${expected.data[at]}; ` +
      `error ${worst.toExponential(2)}, allowed ${allowed.toExponential(2)}`);
  }
}

const asList = <T>(value: T | T[]): T[] => (Array.isArray(value) ? value : [value]);
/** Plain-object results (such as a plan of several index tensors) count as lists of their tensors. */
export const flatten = (value: unknown): unknown[] =>
  typeof value === "object" && value !== null && !Array.isArray(value) &&
  !(value instanceof Tensor) && !("data" in value)
    ? Object.values(value).filter((item) => typeof item === "object")
    : asList(value);

function seedOf(text: string): number {
  let hash = 2166136261;
  for (const c of text) hash = Math.imul(hash ^ c.codePointAt(0)!, 16777619);
  return hash >>> 0;
}

/** Runs one sample on a device and throws where forward, gradients, repeatability or memory are not right. */
export async function checkSample(device: Device, spec: OpSamples, sample: Sample): Promise<void> {
  if (spec.needs && !device.gpuDevice.features.has(spec.needs)) {
    const message = new RegExp(`${spec.op.opName}.*${spec.needs}`);
    const name = `${sample.name}, without ${spec.needs}`;
    return checkError(device, spec, { name, args: sample.args, message });
  }
  const label = `${spec.op.opName} "${sample.name}"`;
  const draw = () => new Draw(seedOf(label));
  const host = sample.args(draw());
  const tolerance = sample.tolerance ?? defaultTolerance(sample.reduction ?? 64);
  const call = spec.op as unknown as (...args: unknown[]) => Tensor | Tensor[];

  const expectedAll = flatten((spec.reference as (...args: unknown[]) => unknown)(
    ...sample.args(draw()).map((arg) =>
      mapTensors(arg, (h) => ndarray(h.shape, h.data.slice()))))) as NdArray[];
  const r = new Draw(seedOf(`${label} gradients`));
  const runs: NdArray[][] = [];
  let hostGrads: (HostTensor | null)[] = [];
  let integer: boolean[] = [];
  const before = device.pool.liveBytes;
  for (let run = 0; run < 2; run++) {
    const made: Tensor[] = [];
    const args = host.map((arg) => mapTensors(arg, (h) => {
      const tensor = upload(device, h);
      made.push(tensor);
      return tensor;
    }));
    const differentiable = args.map((arg) =>
      spec.op.differentiable && arg instanceof Tensor && isFloat(arg.dtype));
    args.forEach((arg, i) => {
      if (differentiable[i]) (arg as Tensor).requiresGrad = true;
    });
    const tape = new Tape();
    const results: NdArray[] = [];
    const outputs = flatten(tape.run(() => call(...args))) as Tensor[];
    const mutated = spec.op.mutates.flatMap((i) => args[i] instanceof Tensor ? [args[i]] : []);
    integer = [...outputs, ...mutated].map((tensor) => !isFloat(tensor.dtype));
    for (const tensor of [...outputs, ...mutated]) results.push(await download(tensor));
    if (spec.op.differentiable) {
      if (run === 0) hostGrads = outputs.map((output) => output.requiresGrad ? r.normal(output.shape) : null);
      const seeds = hostGrads.flatMap((g, i) => g ? [{ output: outputs[i]!, g }] : []);
      const seedTensors = seeds.map(({ g }) => upload(device, g));
      const gradients = tape.backward(seeds.map(({ output }) => output), seedTensors);
      for (let i = 0; i < args.length; i++) {
        if (!differentiable[i]) continue;
        const gradient = gradients.get((args[i] as Tensor).key);
        results.push(gradient
          ? ndarray((args[i] as Tensor).shape, (await download(gradient)).data)
          : ndarray((args[i] as Tensor).shape));
      }
      for (const gradient of gradients.values()) gradient.release();
      for (const seed of seedTensors) seed.dispose();
    }
    for (const tensor of [...outputs, ...made]) tensor.dispose();
    runs.push(results);
  }
  const [first, second] = runs as [NdArray[], NdArray[]];
  expectedAll.forEach((expected, i) => {
    compare(`${label} output ${i}`, first[i]!, expected, tolerance, integer[i] ?? false);
  });
  if (spec.op.differentiable) {
    if (!spec.vjp) throw new Error(`${label}: the op is differentiable, but its samples give no vjp`);
    const expected = (spec.vjp as (...args: unknown[]) => (NdArray | null | undefined)[])(
      hostGrads.map((g) => g && ndarray(g.shape, g.data)),
      ...sample.args(draw()).map((arg) => mapTensors(arg, (h) => ndarray(h.shape, h.data.slice()))));
    let at = expectedAll.length;
    host.forEach((arg, i) => {
      if (!isHost(arg) || !isFloat(arg.dtype)) return;
      compare(
        `${label} gradient of argument ${i}`, first[at++]!, expected[i] ?? ndarray(arg.shape), 4 * tolerance);
    });
    if (!spec.straightThrough) directional(label, spec, host, hostGrads);
  }
  first.forEach((array, i) => compare(`${label} result ${i}, run again`, second[i]!, array, 0));
  if (device.pool.liveBytes !== before) {
    throw new Error(`${label}: ${device.pool.liveBytes - before} bytes are still live afterwards`);
  }
}

/** The reference's own gradients against a central difference in one random direction. */
function directional(
  label: string, spec: OpSamples, host: readonly unknown[], grads: (HostTensor | null)[],
): void {
  const forward = spec.reference as (...args: unknown[]) => unknown;
  const vjp = spec.vjp as (...args: unknown[]) => (NdArray | null | undefined)[];
  const r = new Draw(seedOf(`${label} direction`));
  const plain = (arg: unknown) => mapTensors(arg, (h) => ndarray(h.shape, h.data.slice()));
  const expected = vjp(grads.map((g) => g && ndarray(g.shape, g.data)), ...host.map(plain));
  const directions = host.map((arg, i) =>
    isHost(arg) && isFloat(arg.dtype) && expected[i] ? r.normal(arg.shape) : null);
  let analytic = 0;
  let scale = 0;
  directions.forEach((direction, i) => direction?.data.forEach((d, j) => {
    analytic += d * expected[i]!.data[j]!;
    scale += Math.abs(d * expected[i]!.data[j]!);
  }));
  if (scale === 0) return;
  const at = (step: number) => {
    const moved = host.map((arg, i) => {
      const direction = directions[i];
      return direction
        ? ndarray((arg as NdArray).shape, (arg as NdArray).data.map((x, j) => x + step * direction.data[j]!))
        : plain(arg);
    });
    const outputs = flatten(forward(...moved)) as NdArray[];
    let sum = 0;
    grads.forEach((g, i) => g?.data.forEach((weight, j) => (sum += weight * outputs[i]!.data[j]!)));
    return sum;
  };
  const error = (h: number) => Math.abs((at(h) - at(-h)) / (2 * h) - analytic) / scale;
  // A kink (relu, a changed choice) may lie within one step; it does not lie within all of them.
  const best = Math.min(error(1e-4), error(1e-5), error(1e-6));
  if (!(best < 1e-5)) {
    throw new Error(
      `${label}: the reference's vjp is off its central difference by ${best.toExponential(2)}`);
  }
}

/** Checks that wrong arguments are refused with the promised message. */
export function checkError(
  device: Device, spec: OpSamples, error: NonNullable<OpSamples["errors"]>[number],
): void {
  const before = device.pool.liveBytes;
  let thrown: unknown = null;
  scope(() => {
    const args = error.args(new Draw(1)).map((arg) => mapTensors(arg, (h) => upload(device, h)));
    try {
      (spec.op as unknown as (...args: unknown[]) => unknown)(...args);
    } catch (e) {
      thrown = e;
    }
  });
  const message = thrown instanceof Error ? thrown.message : "nothing was thrown";
  if (!error.message.test(message)) {
    throw new Error(
      `${spec.op.opName} "${error.name}": expected an error like ${error.message}, found: ${message}`);
  }
  if (device.pool.liveBytes !== before) {
    throw new Error(`${spec.op.opName} "${error.name}": the refused call leaks memory`);
  }
}
