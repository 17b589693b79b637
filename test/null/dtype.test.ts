import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { memorySource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import type { TensorReader } from "../../src/io/safetensors.ts";
import {
  DTYPES, bf16ToF32, byteLengthOf, bytesPerElement, decodeFloat32, decodeInt32, e2m1ToF32, e4m3ToF32,
  e5m2ToF32, e8m0ToF32, encodeFloat, f16ToF32, f32ToBf16, f32ToE2m1, f32ToE4m3, f32ToE5m2, f32ToE8m0,
  f32ToF16, isDType,
} from "../../src/tensor/dtype.ts";
import type { DType } from "../../src/tensor/dtype.ts";
import { DTypeError, ShapeError } from "../../src/tensor/errors.ts";
import { ndarray, sizeOf } from "../../src/tensor/ndarray.ts";

// 10,000 inputs (every code, every midpoint and its neighbours, random bit patterns) with the codes that an
// independent implementation in exact arithmetic gives; the half precision codes are NumPy's.
const fixture = new URL("../fixtures/numerics.safetensors", import.meta.url);
let numerics: TensorReader;
let inputs: Float32Array;

beforeAll(async () => {
  numerics = await openSafetensors(memorySource("numerics.safetensors", readFileSync(fixture)));
  inputs = decodeFloat32("F32", await numerics.read("round.input_bits"));
});

/** Equal as bits, with all NaNs alike. */
const same = (a: number, b: number): boolean => Object.is(a, b);

describe("values of codes", () => {
  test.each([
    ["table.e4m3fn", e4m3ToF32],
    ["table.e5m2", e5m2ToF32],
    ["table.e8m0", e8m0ToF32],
    ["table.e2m1", e2m1ToF32],
  ] as const)("%s", async (name, decode) => {
    const table = await numerics.readTensorF32(name);
    expect(table.length).toBe(name === "table.e2m1" ? 16 : 256);
    table.forEach((value, code) => {
      const found = decode(code);
      if (!same(found, value)) throw new Error(`code ${code}: expected ${value}, found ${found}`);
    });
  });

  test("all 65,536 half precision codes are sign * 2^e * (1 + f/1024) and come back", () => {
    for (let code = 0; code < 65536; code++) {
      const [field, fraction] = [(code >> 10) & 31, code & 1023];
      const magnitude = field === 31 ? (fraction ? NaN : Infinity)
        : field === 0 ? fraction / 2 ** 24 : (1 + fraction / 1024) * 2 ** (field - 15);
      const value = f16ToF32(code);
      const expected = code >= 32768 ? -magnitude : magnitude;
      if (!same(value, expected)) throw new Error(`code ${code}: expected ${expected}, found ${value}`);
      const back = f32ToF16(value);
      if (back !== (Number.isNaN(value) ? 0x7e00 : code)) throw new Error(`${code} came back as ${back}`);
    }
  });

  test("all 65,536 bfloat16 codes are the upper half of a float32 and come back", () => {
    const view = new DataView(new ArrayBuffer(4));
    for (let code = 0; code < 65536; code++) {
      view.setUint32(0, code * 65536);
      const value = bf16ToF32(code);
      if (!same(value, view.getFloat32(0))) throw new Error(`code ${code}: found ${value}`);
      const back = f32ToBf16(value);
      if (back !== (Number.isNaN(value) ? 0x7fc0 : code)) throw new Error(`${code} came back as ${back}`);
    }
  });

  test("every 8-bit and 4-bit code comes back", () => {
    for (let code = 0; code < 256; code++) {
      if (!Number.isNaN(e4m3ToF32(code))) expect(f32ToE4m3(e4m3ToF32(code))).toBe(code);
      if (Number.isFinite(e5m2ToF32(code))) expect(f32ToE5m2(e5m2ToF32(code))).toBe(code);
      expect(f32ToE8m0(e8m0ToF32(code), "floor")).toBe(code);
      expect(f32ToE8m0(e8m0ToF32(code), "ceil")).toBe(code);
    }
    for (let code = 0; code < 16; code++) expect(f32ToE2m1(e2m1ToF32(code))).toBe(code);
  });
});

describe("rounding 10,000 float32 values", () => {
  const bf16 = (x: number) => f32ToBf16(x);
  test.each([
    ["round.bf16", bf16],
    ["round.bf16.sat", (x: number) => f32ToBf16(x, true)],
    ["round.f16", (x: number) => f32ToF16(x)],
    ["round.e4m3fn.sat", (x: number) => f32ToE4m3(x)],
    ["round.e4m3fn.nosat", (x: number) => f32ToE4m3(x, false)],
    ["round.e5m2.sat", (x: number) => f32ToE5m2(x)],
    ["round.e5m2.nosat", (x: number) => f32ToE5m2(x, false)],
    ["round.e2m1.sat", f32ToE2m1],
    ["round.e8m0.floor", (x: number) => f32ToE8m0(x, "floor")],
    ["round.e8m0.ceil", (x: number) => f32ToE8m0(x, "ceil")],
  ] as const)("%s", async (name, encode) => {
    const codes = await numerics.readTensorI32(name);
    expect(codes.length).toBe(inputs.length);
    inputs.forEach((x, i) => {
      // NumPy keeps NaN payloads; any NaN code is right there.
      if (name === "round.f16" && Number.isNaN(x)) return;
      const found = encode(x);
      if (found !== codes[i]) throw new Error(`${name} of ${x}: expected ${codes[i]}, found ${found}`);
    });
  });

  test("doubles are rounded once, not first to float32", () => {
    // Just above the midpoint of 1 and 1 + 2^-10: through float32 it would become the midpoint and go down.
    expect(f32ToF16(1 + 2 ** -11 + 2 ** -40)).toBe(0x3c01);
    expect(f32ToF16(1 + 2 ** -11)).toBe(0x3c00);
  });
});

describe("arrays of bytes", () => {
  const values = Float32Array.of(0, -0, 1, -2.5, 448, 1e6, 2 ** -20, Infinity);

  test.each([
    ["F64", [...values]],
    ["F32", [...values]],
    ["BF16", [0, -0, 1, -2.5, 448, 999424, 2 ** -20, Infinity]],
    ["F16", [0, -0, 1, -2.5, 448, Infinity, 2 ** -20, Infinity]],
    ["F8_E4M3", [0, -0, 1, -2.5, 448, 448, 0, 448]],
    ["F8_E5M2", [0, -0, 1, -2.5, 448, 57344, 0, 57344]],
    ["F4", [0, -0, 1, -2, 6, 6, 0, 6]],
    ["F8_E8M0", [2 ** -127, 2 ** -127, 1, 4, 512, 2 ** 20, 2 ** -20, 2 ** 127]],
  ] as const)("%s there and back", (dtype, expected) => {
    const bytes = encodeFloat(dtype, values);
    expect(bytes.length).toBe(byteLengthOf(dtype, values.length));
    // An odd offset into a larger buffer: no typed array view fits there.
    const shifted = new Uint8Array(bytes.length + 1);
    shifted.set(bytes, 1);
    expect([...decodeFloat32(dtype, shifted.subarray(1))]).toEqual(expected);
    expect([...decodeFloat32(dtype, Buffer.from(bytes))]).toEqual(expected);
  });

  test("saturation is on by default for 8 bits and off for 16", () => {
    const million = Float32Array.of(1e6);
    expect(decodeFloat32("F16", encodeFloat("F16", million, true))[0]).toBe(65504);
    expect(decodeFloat32("F8_E5M2", encodeFloat("F8_E5M2", million, false))[0]).toBe(Infinity);
    expect(decodeFloat32("F8_E4M3", encodeFloat("F8_E4M3", million, false))[0]).toBe(NaN);
  });

  test.each([
    ["I8", Int8Array.of(-128, 0, 127)],
    ["U8", Uint8Array.of(0, 200, 255)],
    ["BOOL", Uint8Array.of(0, 1, 1)],
    ["I16", Int16Array.of(-32768, 7)],
    ["U16", Uint16Array.of(0, 65535)],
    ["I32", Int32Array.of(-(2 ** 31), 2 ** 31 - 1)],
    ["U32", Uint32Array.of(0, 2 ** 31 - 1)],
    ["I64", BigInt64Array.of(-(2n ** 31n), 5n)],
    ["U64", BigUint64Array.of(0n, 2n ** 31n - 1n)],
  ] as const)("%s to int32", (dtype, array) => {
    const bytes = new Uint8Array(array.buffer);
    expect([...decodeInt32(dtype, bytes)]).toEqual(Array.from(array, Number));
  });

  test("what does not fit is refused", () => {
    const bytesOf = (array: Uint32Array | BigInt64Array) => new Uint8Array(array.buffer);
    expect(() => decodeInt32("U32", bytesOf(Uint32Array.of(1, 2 ** 31)))).toThrow(
      "dtype U32: value 2147483648 at index 1 is outside the int32 range",
    );
    expect(() => decodeInt32("I64", bytesOf(BigInt64Array.of(2n ** 53n + 1n)))).toThrow(DTypeError);
    expect(() => decodeInt32("F32", new Uint8Array(4))).toThrow(/expected an integer format/);
    expect(() => decodeFloat32("I32", new Uint8Array(4))).toThrow(/expected a float format/);
    expect(() => decodeFloat32("F32", new Uint8Array(6))).toThrow(/multiple of 4 bytes, found 6 bytes/);
    expect(() => encodeFloat("F4", new Float32Array(3))).toThrow(/even count of values, found 3/);
    expect(() => encodeFloat("I8", new Float32Array(3))).toThrow(DTypeError);
  });

  test("the table of formats", () => {
    for (const [dtype, { bits }] of Object.entries(DTYPES) as [DType, { bits: number }][]) {
      if (dtype === "F4") expect(() => bytesPerElement(dtype)).toThrow(DTypeError);
      else expect(bytesPerElement(dtype)).toBe(bits / 8);
    }
    expect([isDType("BF16"), isDType("bf16"), isDType("toString")]).toEqual([true, false, false]);
    const lengths = [byteLengthOf("F4", 3), byteLengthOf("F4", 4), byteLengthOf("F64", 2 ** 50)];
    expect(lengths).toEqual([null, 2, null]);
  });
});

describe("NdArray", () => {
  test("sizeOf multiplies with a guard", () => {
    expect([sizeOf([]), sizeOf([3, 4]), sizeOf([2 ** 40, 0, 2 ** 40])]).toEqual([1, 12, 0]);
    expect(() => sizeOf([2 ** 30, 2 ** 30])).toThrow(ShapeError);
    expect(() => sizeOf([2, -1])).toThrow("shape [2, -1]: extents must be integers >= 0, found -1");
    expect(() => sizeOf([1.5])).toThrow(ShapeError);
  });

  test("ndarray checks the count of values and copies them", () => {
    const data = [1, 2, 3];
    const array = ndarray([3], data);
    data[0] = 9;
    expect(array).toEqual({ shape: [3], data: Float64Array.of(1, 2, 3) });
    expect(ndarray([2, 2]).data).toEqual(new Float64Array(4));
    expect(() => ndarray([2, 2], [1])).toThrow("ndarray [2, 2]: expected 4 values, found 1");
  });
});
