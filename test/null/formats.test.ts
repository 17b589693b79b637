import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { memorySource } from "../../src/io/files.ts";
import { openSafetensors, type TensorReader } from "../../src/io/safetensors.ts";
import {
  dequantizeScaled, ELEMENTS, type ElementFormat, encodeStochastic, isElementFormat, isScaledFormat,
  packNibbles, quantizeScaled, SCALED_FORMATS, SCALED_LAYOUTS, type ScaledFormat, type ScaledOptions,
  type StochasticFormat, unpackNibbles,
} from "../../src/tensor/formats.ts";

// Three matrices (many orders of magnitude, zero blocks and ties; 2^-110 to 2^110 and subnormals; normal
// values) and what an independent implementation in exact arithmetic makes of them. Values of codes and
// packed codes are there as digests.
let golden: TensorReader;

const open = (name: string) => openSafetensors(
  memorySource(name, readFileSync(new URL(`../fixtures/${name}`, import.meta.url))));
const digest = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");
const bytesOf = (values: Float32Array) => new Uint8Array(values.buffer);

beforeAll(async () => {
  golden = await open("block_formats.safetensors");
});

/** Deterministic float32 bit patterns. */
function patterns(count: number, seed = 1): Float32Array {
  const bits = new Uint32Array(count);
  let state = seed;
  for (let i = 0; i < count; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    bits[i] = state ^ (state >>> 13);
  }
  return new Float32Array(bits.buffer);
}

/** Deterministic values from -1 to 1. */
function noise(count: number, seed: number): Float32Array {
  return Float32Array.from(new Uint32Array(patterns(count, seed).buffer), (bits) => bits / 2 ** 31 - 1);
}

describe("elements", () => {
  test.each(["e4m3fn", "e5m2", "e2m1", "bf16", "f16"] as const)("%s: range and saturation", (format) => {
    const { bits, max, emax, encode, decode } = ELEMENTS[format];
    const values = Array.from({ length: 2 ** bits }, (_, code) => decode(code)).filter(Number.isFinite);
    expect(values.reduce((a, b) => Math.max(a, b))).toBe(max);
    expect(2 ** emax <= max && max < 2 ** (emax + 1)).toBe(true);
    expect(decode(encode(1e39))).toBe(max);
    expect(decode(encode(-Infinity))).toBe(-max);
  });

  test("names", () => {
    expect([isElementFormat("e4m3fn"), isElementFormat("e4m3"), isElementFormat("toString")])
      .toEqual([true, false, false]);
    expect([...SCALED_FORMATS].sort()).toEqual(Object.keys(SCALED_LAYOUTS).sort());
    expect([isScaledFormat("nvfp4"), isScaledFormat("q8"), isScaledFormat("valueOf")])
      .toEqual([true, false, false]);
  });
});

describe("stochastic rounding", () => {
  test("2.3 becomes 3 for 76 of 256 random numbers, and -2.3 likewise", () => {
    for (const [x, up, down] of [[2.3, 5, 4], [-2.3, 13, 12]] as const) {
      const codes = Array.from({ length: 256 }, (_, r) => encodeStochastic("e2m1", x, r));
      expect(codes.filter((code) => code === up)).toHaveLength(76);
      expect(codes.filter((code) => code === down)).toHaveLength(180);
    }
  });

  const sizes = { e2m1: 256, e4m3fn: 256, e5m2: 256, bf16: 65536, f16: 65536 };
  test.each(Object.entries(sizes) as [StochasticFormat, number][])(
    "%s: the mean is the value, and only its two neighbours occur", (format, count) => {
      const { max, decode } = ELEMENTS[format];
      const isCode = (x: number) => decode(ELEMENTS[format].encode(x)) === x;
      for (const value of patterns(count > 256 ? 40 : 4000, 7)) {
        if (!(Math.abs(value) < max)) continue;
        let sum = 0;
        const found = new Set<number>();
        const step = count > 256 ? 257 : 1; // every 257th: all residues of the high byte
        for (let r = 0; r < count; r += step) {
          const rounded = decode(encodeStochastic(format, value, r));
          sum += rounded;
          found.add(rounded);
        }
        const [low = NaN, high = low, ...more] = [...found].sort((a, b) => a - b);
        expect(more).toEqual([]);
        if (isCode(value)) expect([low, high]).toEqual([value, value]);
        else expect(low <= value && value <= high || low === high).toBe(true);
        const mean = sum / Math.ceil(count / step);
        const spacing = Math.max(high - low, 2 ** -24 * Math.abs(low));
        if (low !== high) expect(Math.abs(mean - value)).toBeLessThanOrEqual(spacing / 200);
      }
    });

  test("with no random bits it rounds towards zero, with all of them it keeps what is exact", () => {
    for (const format of ["e2m1", "e4m3fn", "e5m2"] as const) {
      const { bits, decode } = ELEMENTS[format];
      for (let code = 0; code < 2 ** bits; code++) {
        const value = decode(code);
        if (!Number.isFinite(value)) continue;
        expect(encodeStochastic(format, value, 0)).toBe(code);
        expect(encodeStochastic(format, value, 255)).toBe(code);
        const next = decode(code + 1);
        if (Number.isFinite(next) && Math.abs(next) > Math.abs(value)) {
          expect(encodeStochastic(format, value + 0.999 * (next - value), 0)).toBe(code);
        }
      }
    }
    expect(encodeStochastic("e2m1", NaN, 9)).toBe(7);
    expect(encodeStochastic("e4m3fn", NaN, 9)).toBe(0x7f);
    expect(encodeStochastic("e5m2", -Infinity, 255)).toBe(0xfb);
    expect(encodeStochastic("e4m3fn", 1e9, 255)).toBe(0x7e);
  });
});

type Case = [name: string, format: ScaledFormat, options: ScaledOptions];
const cases: Case[] = (["x", "x_normal", "x_wide"] as const).flatMap((matrix): Case[] => [
  ...(["mxfp8_e4m3", "mxfp4"] as const).flatMap((format) => (["floor", "ceil"] as const).map(
    (scaleRule): Case => [`${matrix}.${format}.${scaleRule}`, format, { scaleRule }])),
  ...(matrix === "x_normal" ? [] : [[`${matrix}.mxfp8_e5m2.floor`, "mxfp8_e5m2", {}] as Case]),
  ...(matrix === "x_wide" ? [] : (["nvfp4", "nvfp4_16x16"] as const).map(
    (format): Case => [`${matrix}.${format}`, format, {}])),
]);

describe("blocks, against exact tables", () => {
  test.each(cases)("%s", async (name, format, options) => {
    const matrix = `block.${name.split(".")[0]!}`;
    const { shape } = golden.info(matrix);
    const found = quantizeScaled(await golden.readTensorF32(matrix), shape, format, options);
    expect(found.scaleShape).toEqual(golden.info(`block.${name}.scales`).shape);
    expect(found.scales).toEqual(await golden.read(`block.${name}.scales`));
    expect(found.codes).toEqual(await golden.read(`block.${name}.codes`));
    const global = `block.${name}.global_scale`;
    if (golden.tensors.has(global)) expect(found.global).toBe((await golden.readTensorF32(global))[0]);
    else expect(found.global).toBe(null);
    expect(digest(bytesOf(dequantizeScaled(found)))).toBe(golden.metadata[`block.${name}.dequant`]);
    const packed = golden.metadata[`block.${name}.packed`];
    if (packed) {
      const bytes = packNibbles(found.codes, shape.at(-1)!);
      expect(digest(bytes)).toBe(packed);
      expect(unpackNibbles(bytes)).toEqual(found.codes);
    }
  });

  test("all cases of the fixture are looked at", () => {
    const names = [...golden.tensors.keys()].filter((name) => name.endsWith(".codes"));
    expect(names.map((name) => name.slice(6, -6)).sort()).toEqual(cases.map(([name]) => name).sort());
  });
});

describe("NVFP4", () => {
  test("the published example of the training library gives the same codes", () => {
    const values = Float32Array.from({ length: 32 }, (_, i) => i < 16 ? (i - 15) / 8 : (i - 24) / 100);
    const { codes, scales } = quantizeScaled(values, [32], "nvfp4");
    expect([...scales]).toEqual([0x7e, 0x5a]);
    expect([...codes].join(" ")).toBe(
      "15 15 15 14 14 14 14 13 13 12 12 11 10 10 9 0 15 15 14 14 13 12 11 9 0 1 3 4 5 6 6 7");
  });

  test("with reciprocals, the values and edges of that library's definition", () => {
    const example = Float32Array.from({ length: 32 }, (_, i) => i < 16 ? (i - 15) / 8 : (i - 24) / 100);
    const found = quantizeScaled(example, [32], "nvfp4", { reciprocals: true });
    expect([...found.scales]).toEqual([0x7e, 0x5a]);
    expect([...new Uint32Array(packNibbles(found.codes, 32).buffer)]).toEqual(
      [0xdeeeefff, 0x09aabccd, 0x9bcdeeff, 0x76654310]);
    expect(found.global).toBe(Math.fround(1 / Math.fround(2688 / 1.875)));
    const values = dequantizeScaled(found).subarray(16, 21);
    [-0.08370537, -0.08370537, -0.05580357, -0.05580357, -0.04185268].forEach((value, i) =>
      expect(values[i]).toBeCloseTo(value, 8));
    // A block of zeros; one whose scale is 0, whose codes are the largest and stand for 0; a zero tensor.
    const low = new Float32Array(48);
    low[0] = 1;
    low[16] = -1e-6;
    const [codes, zero] = [quantizeScaled(low, [48], "nvfp4", { reciprocals: true }),
      quantizeScaled(new Float32Array(16), [16], "nvfp4", { reciprocals: true })];
    expect([...codes.scales]).toEqual([0x7e, 0, 0]);
    expect([codes.codes[0], codes.codes[16], codes.codes[17], codes.codes[32]]).toEqual([7, 15, 0, 0]);
    expect(dequantizeScaled(codes)[16]).toBeCloseTo(0, 30);
    expect([zero.global, zero.scales[0], zero.codes[0]]).toEqual([1, 0, 0]);
    // Both orders agree almost everywhere, and not everywhere.
    const many = noise(16 * 4000, 3);
    const [a, b] = [{}, { reciprocals: true }].map((options) =>
      quantizeScaled(many, [16 * 4000], "nvfp4", options).codes) as [Uint8Array, Uint8Array];
    const differ = a.filter((code, i) => code !== b[i]).length;
    expect(differ).toBeLessThan(100);
  });

  test("tiles of 16 x 16: a matrix and its transpose have the same codes", () => {
    const n = 48;
    const values = noise(n * n, 3);
    const turned = values.map((_, i) => values[(i % n) * n + Math.floor(i / n)]!);
    const [a, b] = [values, turned].map((v) => quantizeScaled(v, [n, n], "nvfp4_16x16")) as
      [ReturnType<typeof quantizeScaled>, ReturnType<typeof quantizeScaled>];
    a.codes.forEach((code, i) => expect(b.codes[(i % n) * n + Math.floor(i / n)]).toBe(code));
    a.scales.forEach((scale, i) => expect(b.scales[(i % 3) * 3 + Math.floor(i / 3)]).toBe(scale));
  });

  test("zeros, and a tensor too small for its scale, become zeros with their signs", () => {
    for (const values of [Float32Array.of(...new Array<number>(15).fill(0), -0),
      new Float32Array(16).fill(-1e-45)]) {
      const found = quantizeScaled(values, [16], "nvfp4");
      expect([...found.scales]).toEqual([0]);
      expect(found.codes).toEqual(Uint8Array.from(values, (x) => Object.is(x, -0) || x < 0 ? 8 : 0));
      expect(dequantizeScaled(found).every((x) => x === 0)).toBe(true);
    }
  });

  test("a given tensor scale is used, and one that cannot be is refused", () => {
    const values = noise(64, 5);
    const plain = quantizeScaled(values, [64], "nvfp4");
    const given = quantizeScaled(values, [64], "nvfp4", { tensorScale: 2 * plain.global! });
    expect(given.global).toBe(2 * plain.global!);
    expect(given.scales).not.toEqual(plain.scales);
    for (const tensorScale of [0, -1, NaN, Infinity, 1e-60]) {
      expect(() => quantizeScaled(values, [64], "nvfp4", { tensorScale }))
        .toThrow(/nvfp4: tensorScale must be positive and finite, found/);
    }
  });

  test("four over six never has a larger error in a block, and a smaller one somewhere", () => {
    const values = noise(16 * 400, 11);
    for (const fourOverSix of ["absolute", "squared"] as const) {
      const both = quantizeScaled(values, [16 * 400], "nvfp4", { fourOverSix });
      const one = quantizeScaled(values, [16 * 400], "nvfp4", { tensorScale: both.global! });
      const [x, y] = [dequantizeScaled(both), dequantizeScaled(one)];
      let better = 0;
      for (let b = 0; b < 400; b++) {
        const [p, q] = [x, y].map((all) => {
          let sum = 0;
          for (let i = 16 * b; i < 16 * b + 16; i++) {
            const d = Math.abs(all[i]! - values[i]!);
            sum += fourOverSix === "absolute" ? d : d * d;
          }
          return sum;
        }) as [number, number];
        expect(p).toBeLessThanOrEqual(q * (1 + 1e-6));
        if (p < q) better++;
      }
      expect(better).toBeGreaterThan(40);
    }
  });
});

describe("MX", () => {
  // The largest magnitude of a block and its scale code, by rule: 2^e with 127 + e.
  test.each([
    [448, 127, 127], [449, 127, 128], [500, 127, 128], [10, 122, 122], [6, 121, 121], [0, 0, 0],
    [2 ** -149, 0, 0], [Infinity, 254, 254], [NaN, 255, 255],
  ])("a largest value of %d gives scales %d and %d in mxfp8_e4m3", (amax, floor, ceil) => {
    const values = new Float32Array(32);
    values[9] = -amax;
    const scaleOf = (scaleRule: "floor" | "ceil") =>
      quantizeScaled(values, [32], "mxfp8_e4m3", { scaleRule }).scales[0];
    expect([scaleOf("floor"), scaleOf("ceil")]).toEqual([floor, ceil]);
  });
});

describe("FP8 with float32 scales", () => {
  const values = Float32Array.from({ length: 6 }, (_, i) => [1, -2, 3, 100, 0, -450][i]!);
  test("one scale, or one per row", () => {
    const one = quantizeScaled(values, [2, 3], "fp8_e4m3");
    expect([one.scaleShape, [...one.scales]]).toEqual([[], [Math.fround(450 / 448)]]);
    expect(one.codes[5]).toBe(0xfe);
    const rows = quantizeScaled(values, [2, 3], "fp8_e5m2", { perRow: true });
    expect([rows.scaleShape, [...rows.scales]])
      .toEqual([[2], [Math.fround(3 / 57344), Math.fround(450 / 57344)]]);
    expect(dequantizeScaled(rows)[2]).toBe(3);
    expect([...quantizeScaled(new Float32Array(3), [3], "fp8_e4m3").scales]).toEqual([1]);
    expect([...quantizeScaled(values, [6], "fp8_e4m3", { tensorScale: 0.5 }).scales]).toEqual([0.5]);
  });

  test("blockwise: powers of two for 1 x 128 and 128 x 128, nothing saturates", () => {
    const many = noise(256 * 256, 21).map((x) => Math.tan(1.5 * x));
    for (const [blockRows, shape] of [[1, [256, 2]], [128, [2, 2]]] as const) {
      const found = quantizeScaled(many, [256, 256], "fp8_blockwise", { blockRows });
      expect(found.scaleShape).toEqual(shape);
      for (const scale of found.scales) expect(Number.isInteger(Math.log2(scale))).toBe(true);
      const wrong = dequantizeScaled(found).filter((x, i) => {
        const row = blockRows === 1 ? i >> 8 : i >> 15;
        const scale = found.scales[row * 2 + ((i & 255) >> 7)]!;
        // Half a step: 2^-4 of the value, 2^-10 of the scale where it is subnormal.
        return !(Math.abs(x - many[i]!) <= Math.max(Math.abs(many[i]!) * 2 ** -4, scale * 2 ** -10));
      });
      expect(wrong).toHaveLength(0);
      expect(Math.max(...[...found.codes].map((code) => code & 0x7f))).toBeLessThanOrEqual(0x7e);
    }
    expect([...quantizeScaled(new Float32Array(128), [1, 128], "fp8_blockwise", { blockRows: 1 }).scales])
      .toEqual([1]);
    expect([...quantizeScaled(new Float32Array(128).fill(1e-44), [1, 128], "fp8_blockwise",
      { blockRows: 1 }).scales]).toEqual([2 ** -126]);
  });
});

describe("what does not fit is refused", () => {
  test.each([
    ["mxfp4", [4, 48], /tensor "w": mxfp4 has blocks of 32: .*multiple of 32, found \[4, 48\]/],
    ["nvfp4", [2, 3, 24], /tensor "w": nvfp4 has blocks of 16: .*multiple of 16, found \[2, 3, 24\]/],
    ["nvfp4_16x16", [8, 32], /blocks of 16 x 16: .*last but one.*multiple of 16, found \[8, 32\]/],
    ["nvfp4_16x16", [256], /blocks of 16 x 16: expected at least two dimensions, found \[256\]/],
    ["fp8_blockwise", [128, 64], /blocks of 128 x 128: .*multiple of 128, found \[128, 64\]/],
    ["mxfp8_e4m3", [], /blocks of 32: expected at least one dimension, found \[\]/],
  ] as const)("%s of %j", (format, shape, message) => {
    const size = shape.reduce<number>((a, b) => a * b, 1);
    expect(() => quantizeScaled(new Float32Array(size), shape, format, { name: "w" })).toThrow(message);
  });

  test("options of another format, a wrong count, odd rows", () => {
    const values = new Float32Array(32);
    expect(() => quantizeScaled(values, [32], "nvfp4", { scaleRule: "ceil" })).toThrow(
      "nvfp4: the option scaleRule is for other formats.");
    expect(() => quantizeScaled(values, [32], "mxfp4", { fourOverSix: "absolute" })).toThrow(/fourOverSix/);
    expect(() => quantizeScaled(values, [32], "mxfp4", { reciprocals: true })).toThrow(/reciprocals/);
    expect(() => quantizeScaled(values, [32], "nvfp4", { reciprocals: true, tensorScale: 1 })).toThrow(
      "nvfp4: the options reciprocals and tensorScale do not go together.");
    expect(() => quantizeScaled(values, [64], "mxfp4")).toThrow("[64] holds 64 elements, found 32");
    expect(() => packNibbles(new Uint8Array(3), 3)).toThrow(/even width, found 3/);
  });

  test("empty tensors stay empty", () => {
    for (const format of SCALED_FORMATS) {
      const found = quantizeScaled(new Float32Array(0), [0, 128], format);
      expect(found.codes).toHaveLength(0);
      expect(dequantizeScaled(found)).toHaveLength(0);
    }
  });
});

test("random bits reach every element, keyed by its number", () => {
  const values = new Float32Array(64).fill(2.3);
  values[0] = 6;
  values[32] = 6;
  const seen: number[] = [];
  const found = quantizeScaled(values, [64], "mxfp4", { random: (i) => (seen.push(i), i < 32 ? 0 : 255) });
  expect(seen.sort((a, b) => a - b)).toEqual(Array.from({ length: 64 }, (_, i) => i));
  expect(new Set(dequantizeScaled(found).subarray(1, 32))).toEqual(new Set([2]));
  expect(new Set(dequantizeScaled(found).subarray(33))).toEqual(new Set([3]));
});

test("element formats round like the tables", () => {
  const formats: ElementFormat[] = ["e4m3fn", "e5m2", "e2m1", "bf16", "f16", "e8m0"];
  for (const format of formats) {
    const { decode, encode } = ELEMENTS[format];
    for (const x of patterns(2000, 99)) {
      if (Number.isNaN(x)) continue;
      const y = decode(encode(x));
      if (format === "e8m0") expect(y >= Math.abs(x) || y === 2 ** 127).toBe(true);
      else expect(decode(encode(y))).toBe(y);
    }
  }
});
