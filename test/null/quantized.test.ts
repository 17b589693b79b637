import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { memorySource } from "../../src/io/files.ts";
import { readWeightF32 } from "../../src/io/quantized.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import type { TensorEntry, TensorReader } from "../../src/io/safetensors.ts";
import { encodeFloat } from "../../src/tensor/dtype.ts";
import type { DType } from "../../src/tensor/dtype.ts";
import { FormatError } from "../../src/tensor/errors.ts";
import { decodeByHand } from "../support/decode.ts";

const f32 = (...values: number[]) => encodeFloat("F32", Float32Array.from(values));

async function readerOf(tensors: Record<string, [DType, number[], Uint8Array]>): Promise<TensorReader> {
  const entries = Object.entries(tensors).map(([name, [dtype, shape, bytes]]): TensorEntry =>
    ({ name, dtype, shape, bytes }));
  return await openSafetensors(memorySource("m", await encodeSafetensors(entries)));
}

describe("NVFP4", () => {
  // A 64 x 128 matrix with zero blocks and ties: codes, scales and values of an independent implementation.
  let golden: TensorReader;
  let [packed, scales] = [new Uint8Array(0), new Uint8Array(0)];
  let global = 0;
  let values = new Float32Array(0);

  beforeAll(async () => {
    const fixture = readFileSync(new URL("../fixtures/nvfp4.safetensors", import.meta.url));
    golden = await openSafetensors(memorySource("nvfp4.safetensors", fixture));
    packed = new Uint8Array(await golden.read("nvfp4.packed"));
    scales = new Uint8Array(await golden.read("nvfp4.scales"));
    global = (await golden.readTensorF32("nvfp4.global_scale"))[0]!;
    values = new Float32Array(await golden.readTensorF32("nvfp4.dequant"));
  });

  test("code * block scale * global scale, bit for bit", async () => {
    const reader = await readerOf({
      "m.weight": ["U8", [64, 64], packed],
      "m.weight_scale": ["F8_E4M3", [64, 8], scales],
      "m.weight_scale_2": ["F32", [], f32(global)],
    });
    expect(await readWeightF32(reader, "m.weight")).toEqual(values);
  });

  test("the other naming has the reciprocal of the global scale", async () => {
    const power = 2 ** -7;
    const make = async (name: string, suffix: string, scale: number) => readWeightF32(await readerOf({
      [name]: ["U8", [64, 64], packed],
      "m.weight_scale": ["F8_E4M3", [64, 8], scales],
      [`m.${suffix}`]: ["F32", [1], f32(scale)],
    }), name);
    const divided = await make("m.weight_packed", "weight_global_scale", 1 / power);
    expect(divided).toEqual(await make("m.weight", "weight_scale_2", power));
    expect(divided.some((value) => value !== 0)).toBe(true);
  });

  test("all layouts give what their definitions say, bit for bit, for every code", async () => {
    // A linear congruential generator, whose upper bytes fall evenly enough.
    let state = 7;
    const bytes = (count: number, most = 255) => Uint8Array.from({ length: count }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return (state >>> 24) % (most + 1);
    });
    const codes = bytes(64 * 64).map((code) => ((code & 0x7f) === 0x7f ? code - 1 : code));
    const scale = (count: number): [DType, number[], Uint8Array] =>
      ["F8_E4M3", [64, count], bytes(64 * count, 0x7e)];
    const odd = [1 / 3e3, 1.2345e-5, 0.7, 1531.125, 3.3e5];
    const tensors: Record<string, [DType, number[], Uint8Array]> = {};
    odd.forEach((global, i) => {
      tensors[`n${i}.weight`] = ["U8", [64, 64], bytes(64 * 64)];
      tensors[`n${i}.weight_scale`] = scale(8);
      tensors[`n${i}.weight_scale_2`] = ["F32", [], f32(global)];
      tensors[`p${i}.weight_packed`] = ["U8", [64, 64], bytes(64 * 64)];
      tensors[`p${i}.weight_scale`] = scale(8);
      tensors[`p${i}.weight_global_scale`] = ["F32", [1], f32(global)];
      tensors[`e${i}.weight`] = ["F8_E4M3", [64, 64], codes];
      tensors[`e${i}.weight_scale`] = ["F32", [1], f32(global)];
    });
    tensors["r.weight"] = ["F8_E4M3", [64, 64], codes];
    tensors["r.weight_scale"] = ["BF16", [64, 1],
      encodeFloat("BF16", Float32Array.from({ length: 64 }, (_, i) => 0.37 ** (i % 9)))];
    tensors["x.weight"] = ["F8_E4M3", [64, 64], codes];
    tensors["x.weight_scale"] = ["U8", [64, 2], bytes(128, 240)];
    tensors["y.weight_packed"] = ["U8", [64, 32], bytes(64 * 32)];
    tensors["y.weight_scale"] = ["U8", [64, 2], bytes(128, 240)];
    const reader = await readerOf(tensors);
    const stored = new Map(Object.entries(tensors).map(([name, [dtype, shape, content]]) =>
      [name, { dtype, shape, bytes: content }]));
    const names = Object.keys(tensors).filter((name) => /weight(?:_packed)?$/.test(name));
    expect(names).toHaveLength(18);
    for (const name of names) {
      const expected = decodeByHand(stored, name.replace(/\.weight.*$/, ""));
      expect(expected.every(Number.isFinite), name).toBe(true);
      expect(await readWeightF32(reader, name), name).toEqual(expected);
    }
  });

  test("missing or misshapen scales are named", async () => {
    const weight: [DType, number[], Uint8Array] = ["U8", [64, 64], packed];
    const scale: [DType, number[], Uint8Array] = ["F8_E4M3", [64, 8], scales];
    const one: [DType, number[], Uint8Array] = ["F32", [1], f32(1)];
    const fails = async (tensors: Record<string, [DType, number[], Uint8Array]>, message: RegExp) => {
      const reading = readWeightF32(await readerOf(tensors), "m.weight");
      await expect(reading).rejects.toThrow(FormatError);
      await expect(reading).rejects.toThrow(message);
    };
    await fails({ "m.weight": weight }, /"m\.weight": expected its scales in "m\.weight_scale" for U8/);
    await fails({ "m.weight": weight, "m.weight_scale": scale }, /its scales in "m\.weight_scale_2"/);
    const short: [DType, number[], Uint8Array] = ["F8_E4M3", [64, 4], scales.slice(0, 256)];
    await fails({ "m.weight": weight, "m.weight_scale": short, "m.weight_scale_2": one },
      /"m\.weight_scale": expected F8_E4M3 \[64, 8\], found F8_E4M3 \[64, 4\]/);
    const two: [DType, number[], Uint8Array] = ["F32", [2], f32(1, 1)];
    await fails({ "m.weight": weight, "m.weight_scale": scale, "m.weight_scale_2": two },
      /"m\.weight_scale_2": expected 1 scale, found 2/);
    const odd: [DType, number[], Uint8Array] = ["U8", [2, 3], packed.slice(0, 6)];
    await fails({ "m.weight": odd },
      /"m\.weight": expected rows of whole nvfp4 blocks of 16 values, found 6 values/);
  });
});

describe("block scales", () => {
  const codes = Uint8Array.from({ length: 32 }, (_, i) => i);
  const one = f32(1);

  test("that are not numbers or negative are refused, zero is not", async () => {
    for (const [byte, found] of [[0x7f, "NaN"], [0xff, "NaN"], [0xb8, "-1"]] as const) {
      const reader = await readerOf({
        "m.weight": ["U8", [2, 16], codes], "m.weight_scale_2": ["F32", [], one],
        "m.weight_scale": ["F8_E4M3", [2, 2], Uint8Array.of(0x38, 0, 0x38, byte)],
      });
      await expect(readWeightF32(reader, "m.weight")).rejects.toThrow(
        `tensor "m.weight_scale": expected scales that are finite and not negative, found ${found} at 3`);
    }
    const zero = await readerOf({
      "m.weight": ["U8", [2, 16], codes], "m.weight_scale_2": ["F32", [], one],
      "m.weight_scale": ["F8_E4M3", [2, 2], Uint8Array.of(0, 0, 0x38, 0)],
    });
    expect((await readWeightF32(zero, "m.weight")).slice(0, 4)).toEqual(new Float32Array(4));
  });

  test("of powers of two belong to MX formats", async () => {
    const scales = Uint8Array.of(127, 130);
    const reader = await readerOf({
      "a.weight": ["U8", [2, 16], codes], "a.weight_scale": ["U8", [2, 1], scales],
      "b.weight": ["F8_E4M3", [1, 64], new Uint8Array(64).fill(0x38)],
      "b.weight_scale": ["U8", [1, 2], scales],
      "c.weight": ["U8", [2, 16], codes], "c.weight_scale": ["U8", [2, 1], Uint8Array.of(1, 255)],
    });
    const a = await readWeightF32(reader, "a.weight");
    expect([a[1], a[2], a[3], a[34]]).toEqual([0, 0.5, 0, 0.5 * 8]);
    expect(await readWeightF32(reader, "b.weight")).toEqual(
      Float32Array.from({ length: 64 }, (_, i) => (i < 32 ? 1 : 8)));
    await expect(readWeightF32(reader, "c.weight")).rejects.toThrow(/"c\.weight_scale".*found NaN at 1/);
  });

  test("a global scale that is no positive number is named", async () => {
    const reader = await readerOf({
      "m.weight_packed": ["U8", [2, 16], codes], "m.weight_global_scale": ["F32", [1], f32(0)],
      "m.weight_scale": ["F8_E4M3", [2, 2], Uint8Array.of(1, 1, 1, 1)],
    });
    await expect(readWeightF32(reader, "m.weight_packed")).rejects.toThrow(
      'tensor "m.weight_global_scale": expected scales that are positive and finite, found 0');
  });
});

describe("FP8 and plain", () => {
  const codes = encodeFloat("F8_E4M3", Float32Array.of(1, -2, 448, 0.5));
  const weight: [DType, number[], Uint8Array] = ["F8_E4M3", [2, 2], codes];

  test("one scale, or one per row", async () => {
    const reader = await readerOf({
      "a.weight": weight, "a.weight_scale": ["F32", [], f32(0.25)],
      "b.weight": weight, "b.weight_scale": ["F32", [2, 1], f32(2, 10)],
    });
    expect(await readWeightF32(reader, "a.weight")).toEqual(Float32Array.of(0.25, -0.5, 112, 0.125));
    expect(await readWeightF32(reader, "b.weight")).toEqual(Float32Array.of(2, -4, 4480, 5));
  });

  test("without a scale, or with three", async () => {
    const reader = await readerOf({
      "a.weight": weight, "b.weight": weight, "b.weight_scale": ["F32", [3], f32(1, 1, 1)],
    });
    await expect(readWeightF32(reader, "a.weight")).rejects.toThrow(/"a\.weight_scale" for F8_E4M3/);
    await expect(readWeightF32(reader, "b.weight")).rejects.toThrow(
      'tensor "b.weight_scale": expected 1 scale or 2 scales in [2, 1], found [3]');
  });

  test("scales that are no positive numbers", async () => {
    for (const [value, found] of [[NaN, "NaN"], [0, "0"], [-2, "-2"], [Infinity, "Infinity"]] as const) {
      const reader = await readerOf({
        "a.weight": weight, "a.weight_scale": ["F32", [1], f32(value)],
        "b.weight": weight, "b.weight_scale": ["F32", [2, 1], f32(1, value)],
      });
      await expect(readWeightF32(reader, "a.weight")).rejects.toThrow(
        `tensor "a.weight_scale": expected scales that are positive and finite, found ${found}`);
      await expect(readWeightF32(reader, "b.weight")).rejects.toThrow(`found ${found} at 1`);
    }
  });

  test("other floats are read as they are", async () => {
    const bytes = encodeFloat("BF16", Float32Array.of(1.5, -3));
    const reader = await readerOf({ "a.weight": ["BF16", [2], bytes] });
    expect(await readWeightF32(reader, "a.weight")).toEqual(Float32Array.of(1.5, -3));
  });
});
