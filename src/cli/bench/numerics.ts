/**
 * The suite `numerics`: low-precision formats on the adapter against the host, which tests hold against
 * tables. Counts codes, values, quotients and products that differ, over random float32 bit patterns.
 */
import { decode_elements, encode_elements, exact_arithmetic } from "../../ops/elements.ts";
import { f32ToE8m0 } from "../../tensor/dtype.ts";
import type { Device } from "../../tensor/device.ts";
import {
  ELEMENTS, type ElementFormat, encodeStochastic, type StochasticFormat,
} from "../../tensor/formats.ts";
import { scope } from "../../tensor/scope.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import type { Bench } from "./runner.ts";

const SUITE = "numerics";
const PATTERNS = 1e7;
const PIECE = 2 ** 20;

export async function benchNumerics(bench: Bench): Promise<void> {
  for (const name of NUMERIC_CHECKS) {
    if (!bench.wants(SUITE, name)) continue;
    const wrong = await countMismatches(bench.device, name, PATTERNS);
    await bench.add({
      suite: SUITE, case: name, times: [], unit: "mismatches", work: wrong, details: { patterns: PATTERNS },
      remark: `of ${PATTERNS} patterns`,
    });
  }
}

const STOCHASTIC = ["e4m3fn", "e5m2", "e2m1", "bf16", "f16"] as const;
/** What is compared: encoders to nearest and at random, all codes of decoders, exact arithmetic. */
export const NUMERIC_CHECKS = [
  ...[...STOCHASTIC, "e8m0", "e8m0_floor"].map((format) => `encode_${format}`),
  ...STOCHASTIC.map((format) => `encode_random_${format}`),
  ...[...STOCHASTIC, "e8m0"].map((format) => `decode_${format}`), "divide", "multiply",
];

/** Entries out of `count` random bit patterns for which the device and the host disagree. */
export async function countMismatches(
  device: Device, name: string, count: number, seed = 1,
): Promise<number> {
  let wrong = 0;
  for (let first = 0; first < count; first += PIECE) {
    const size = Math.min(PIECE, count - first);
    const [x, y] = [seed + first, seed + first + 2 ** 31].map((start) => patterns(size, start));
    const bits = new Uint32Array(x!.buffer);
    const others = new Uint32Array(y!.buffer);
    const { found, expected } = await compared(device, name, x!, y!);
    for (let i = 0; i < size; i++) {
      const value = expected(x![i]!, y![i]!, bits[i]!, others[i]!);
      if (!Object.is(found[i], value)) wrong++;
    }
  }
  return wrong;
}

interface Compared {
  readonly found: Float32Array | Uint32Array | Int32Array;
  expected(x: number, y: number, bits: number, others: number): number;
}

async function compared(
  device: Device, name: string, x: Float32Array, y: Float32Array,
): Promise<Compared> {
  const words = (values: Float32Array) => new Uint32Array(values.buffer);
  const run = async (body: () => Tensor) => {
    const result = scope(body);
    const found = await result.read();
    result.dispose();
    return found;
  };
  const tensor = (values: Float32Array | Uint32Array) => device.tensor(values, [values.length]);
  const random = /^encode_random_(.*)$/.exec(name)?.[1] as StochasticFormat | undefined;
  if (random) {
    return {
      found: await run(() => encode_elements(tensor(x), random, tensor(words(y)))),
      expected: (value, _y, _bits, others) => encodeStochastic(random, value, others),
    };
  }
  const encode = /^encode_(.*)$/.exec(name)?.[1] as ElementFormat | "e8m0_floor" | undefined;
  if (encode) {
    const found = await run(() => encode_elements(tensor(x), encode, null));
    if (encode === "e8m0_floor") return { found, expected: (value) => f32ToE8m0(value, "floor") };
    return { found, expected: (value) => ELEMENTS[encode].encode(value) };
  }
  const decode = /^decode_(.*)$/.exec(name)?.[1] as ElementFormat | undefined;
  if (decode) {
    const mask = 2 ** ELEMENTS[decode].bits - 1;
    const codes = words(x).map((bits) => bits & mask);
    return {
      found: await run(() => decode_elements(tensor(codes), decode)),
      expected: (_x, _y, bits) => ELEMENTS[decode].decode(bits & mask),
    };
  }
  const operation = name as "divide" | "multiply";
  return {
    found: await run(() => exact_arithmetic(tensor(x), tensor(y), operation)),
    expected: (a, b) => Math.fround(Math.abs(operation === "divide" ? a / b : a * b)),
  };
}

/** Random bit patterns; every fourth with an exponent near 1, where the formats have their codes. */
function patterns(count: number, seed: number): Float32Array {
  const bits = new Uint32Array(count);
  let state = seed >>> 0;
  for (let i = 0; i < count; i++) {
    state = (state + 0x9e3779b9) >>> 0;
    let t = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    t = Math.imul(t ^ (t >>> 15), 0x735a2d97);
    t = (t ^ (t >>> 15)) >>> 0;
    bits[i] = i % 4 > 0 ? t : (t & 0x87ffffff) + 0x3a000000;
  }
  return new Float32Array(bits.buffer);
}
