import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { countMismatches, NUMERIC_CHECKS } from "../../src/cli/bench/numerics.ts";
import { memorySource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { decode_elements, encode_elements } from "../../src/ops/elements.ts";
import { dequantize, quantize } from "../../src/ops/quantize.ts";
import { BlockTensor } from "../../src/tensor/blocks.ts";
import { dequantizeScaled, ELEMENTS, packNibbles, quantizeScaled } from "../../src/tensor/formats.ts";
import { scope } from "../../src/tensor/scope.ts";
import { onEveryAdapter } from "../support/devices.ts";

const blocks = await openSafetensors(memorySource("block_formats.safetensors",
  readFileSync(new URL("../fixtures/block_formats.safetensors", import.meta.url))));
const golden = await openSafetensors(memorySource("numerics.safetensors",
  readFileSync(new URL("../fixtures/numerics.safetensors", import.meta.url))));

await onEveryAdapter((device) => {
  test.each([
    ["e4m3fn", "round.e4m3fn.sat"], ["e5m2", "round.e5m2.sat"], ["e2m1", "round.e2m1.sat"],
    ["bf16", "round.bf16.sat"], ["f16", "round.f16"], ["e8m0", "round.e8m0.ceil"],
    ["e8m0_floor", "round.e8m0.floor"],
  ] as const)("%s rounds 10,000 values like the exact table", async (format, name) => {
    const x = new Float32Array(new Uint8Array(await golden.read("round.input_bits")).buffer);
    const codes = scope(() => encode_elements(device.tensor(x, [x.length]), format, null));
    const found = await codes.read();
    codes.dispose();
    const wrong = [...await golden.readTensorI32(name)].filter((expected, i) => {
      // The table of f16 holds infinities and NumPy's NaN.
      if (format === "f16" && (Number.isNaN(x[i]) || (expected & 0x7fff) === 0x7c00)) return false;
      return found[i] !== expected;
    });
    expect(wrong).toEqual([]);
  });

  test.each(["e4m3fn", "e5m2", "e2m1", "e8m0", "bf16", "f16"] as const)(
    "every code of %s has the value of the host", async (format) => {
      const codes = Uint32Array.from({ length: 2 ** ELEMENTS[format].bits }, (_, i) => i);
      const values = scope(() => decode_elements(device.tensor(codes, [codes.length]), format));
      const found = await values.read();
      values.dispose();
      expect([...codes].filter((code) => !Object.is(found[code], ELEMENTS[format].decode(code)))).toEqual([]);
    });

  // `krait bench numerics` takes 10^7 patterns of each.
  test.each(NUMERIC_CHECKS)("%s of random bit patterns", async (name) => {
    expect(await countMismatches(device, name, 40_000, 12345)).toBe(0);
  });

  const bytes = (array: ArrayBufferView) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

  test.each([...blocks.tensors.keys()].filter((name) => /codes$/.test(name) && !name.includes("16x16")))(
    "%s of the exact table", async (name) => {
      const [, matrix, format, rule] =
        /^block\.(\w+)\.(\w+)(?:\.(floor|ceil))?\.codes$/.exec(name)! as unknown as
          [string, string, "mxfp4" | "nvfp4", "floor" | "ceil" | undefined];
      const values = await blocks.readTensorF32(`block.${matrix}`);
      const tensor = scope(() => quantize(device.tensor(values, [64, 128]), format,
        rule ? { scaleRule: rule } : {}));
      const codes = await blocks.read(name);
      expect(bytes(await tensor.codes.read())).toEqual(
        format.endsWith("fp4") ? packNibbles(codes, 128) : codes);
      expect(bytes(await tensor.scales.read())).toEqual(await blocks.read(name.replace("codes", "scales")));
      if (tensor.global) {
        const global = await blocks.readTensorF32(name.replace("codes", "global_scale"));
        expect(await tensor.global.read()).toEqual(global);
      }
      tensor.dispose();
    });

  test.each([
    ["nvfp4_16x16", {}], ["nvfp4", { fourOverSix: "squared" }], ["fp8_blockwise", {}], ["mxfp8_e5m2", {}],
    ["fp8_e5m2", { perRow: true }],
  ] as const)("%s made on the host stands for the same values on the device", async (format, options) => {
    const values = Float32Array.from({ length: 128 * 256 }, (_, i) => Math.sin(i * 0.37) * (1 + (i % 7)));
    const scaled = quantizeScaled(values, [128, 256], format, options);
    const before = device.pool.liveBytes;
    const tensor = BlockTensor.fromScaled(device, scaled);
    const dense = scope(() => dequantize(tensor));
    expect(await dense.read()).toEqual(dequantizeScaled(scaled));
    dense.dispose();
    tensor.dispose();
    expect(device.pool.liveBytes).toBe(before);
  });

  test("codes and scales that do not fit, or are not finite, are refused by name", () => {
    const raw = { codes: new Uint8Array(64), scales: new Uint8Array(8), global: 1, name: "w" };
    const make = (change: object, shape = [8, 16], format: "nvfp4" | "fp8_e4m3" | "mxfp8_e4m3" = "nvfp4") =>
      () => BlockTensor.fromCodes(device, format, shape, { ...raw, ...change });
    const before = device.pool.liveBytes;
    expect(make({}, [8, 24])).toThrow(/tensor "w": nvfp4: .*multiple of 16, found \[8, 24\]/);
    expect(make({}, [128])).toThrow(/expected a matrix or a stack of them/);
    expect(make({ codes: new Uint8Array(63) })).toThrow(/expected 64 bytes of codes for \[8, 16\], found 63/);
    expect(make({ scales: new Uint8Array(7) })).toThrow(/expected 8 scales for \[8, 16\], found 7/);
    expect(make({ scales: new Float32Array(8) })).toThrow(/expected scales as bytes, found the other/);
    expect(make({ scales: new Uint8Array(8).fill(0x7f) })).toThrow(
      /expected finite scales, found .* 127 at 0/);
    expect(make({ global: NaN })).toThrow(/expected a finite tensor scale, found NaN/);
    expect(make({ global: new Float32Array(3) })).toThrow(/expected 1 tensor scales, found 3/);
    const eight = { codes: new Uint8Array(128).fill(0xff) };
    expect(make({ ...eight, scales: Float32Array.of(1) }, [8, 16], "fp8_e4m3")).toThrow(
      /expected finite codes, found 255 at 0/);
    expect(make({ ...eight, scales: Float32Array.of(NaN) }, [8, 16], "fp8_e4m3")).toThrow(/finite scales/);
    expect(make({ ...eight, scales: new Uint8Array(4).fill(255) }, [4, 32], "mxfp8_e4m3")).toThrow(
      /expected finite scales, found .* 255 at 0/);
    expect(device.pool.liveBytes).toBe(before);
  });
});
