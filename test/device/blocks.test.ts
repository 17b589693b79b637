import { describe, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { tunables } from "../../src/kernel/tuner.ts";
import { embedding } from "../../src/ops/embedding.ts";
import { grouped_linear } from "../../src/ops/grouped_linear.ts";
import { linear } from "../../src/ops/linear.ts";
import {
  grouped_linear_packed, linear_packed, packed_product, type PackedKernel,
} from "../../src/ops/packed_product.ts";
import { dequantize, quantize } from "../../src/ops/quantize.ts";
import { BlockTensor } from "../../src/tensor/blocks.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { onEveryAdapter } from "../support/devices.ts";

const wave = (count: number, step: number) => Float32Array.from(
  { length: count }, (_, i) => Math.sin(i * step));

await onEveryAdapter((device) => {
  describe("block tensors", () => {
    test("products and rows read a quantised weight like the values it stands for", async () => {
      const before = device.pool.liveBytes;
      for (const format of ["q8", "q4", "nvfp4", "fp8_e4m3", "mxfp8_e5m2"] as const) {
        const results = scope(() => {
          const weight = quantize(device.tensor(wave(3 * 20 * 64, 0.37), [60, 64]), format);
          const values = dequantize(weight);
          const x = device.tensor(wave(9 * 64, 0.11), [9, 64]);
          const ids = device.tensor(Int32Array.of(3, 59, 0), [3]);
          const stack = quantize(values.reshape([3, 20, 64]), format);
          const offsets = device.tensor(Uint32Array.of(0, 4, 4, 9), [4]);
          return [
            linear(x, weight, null), linear(x, values, null), embedding(ids, weight), embedding(ids, values),
            grouped_linear(x, stack, offsets), grouped_linear(x, dequantize(stack), offsets),
          ];
        });
        const read: Tensor["read"] extends () => Promise<infer T> ? T[] : never = [];
        for (const result of results) read.push(await result.read());
        for (let i = 0; i < read.length; i += 2) {
          read[i]!.forEach((value, j) => expect(value).toBeCloseTo(read[i + 1]![j]!, 4));
        }
        results.forEach((result) => result.dispose());
      }
      expect(device.pool.liveBytes).toBe(before);
    });

    test("a product of packed factors is that of their values, exactly where sums are exact", async () => {
      const [M, N, K] = [19, 21, 48];
      const before = device.pool.liveBytes;
      const results = scope(() => {
        // All codes; scales from 0.5 to 1.875; of the tensors 2 and 0.25.
        const packed = (rows: number, step: number, global: number) => BlockTensor.fromCodes(
          device, "nvfp4", [rows, K], {
            codes: Uint8Array.from({ length: (rows * K) / 2 }, (_, i) => (i * step + (i >> 3)) & 0xff),
            scales: Uint8Array.from({ length: (rows * K) / 16 }, (_, i) => 0x30 + ((i * step) % 16)), global,
          });
        const [x, w] = [packed(M, 37, 2), packed(N, 59, 0.25)];
        // Every kernel that the device has gives these bits.
        const kernels = tunables.get("quant/packed_product")!.candidates(
          device, { m: M, n: N, k: K, format: "nvfp4" }) as PackedKernel[];
        const each = kernels.map((kernel) => packed_product(
          x.codes, x.scales, w.codes, w.scales, null,
          { xFormat: "nvfp4", format: "nvfp4", xGlobal: x.global, global: w.global, kernel }));
        return [linear_packed(x, w), dequantize(x), dequantize(w), ...each];
      });
      expect(results.length).toBeGreaterThan(4);
      const [y, x, w, ...others] = await Promise.all(results.map((result) => result.read()));
      const expected = Float64Array.from({ length: M * N }, (_, i) => {
        let sum = 0;
        for (let k = 0; k < K; k++) sum += x![Math.floor(i / N) * K + k]! * w![(i % N) * K + k]!;
        return sum;
      });
      expect(expected.some((value) => value !== 0 && !Number.isInteger(value))).toBe(true);
      expect([...y!]).toEqual([...expected]);
      for (const other of others) expect(other).toEqual(y);
      results.forEach((result) => result.dispose());
      expect(device.pool.liveBytes).toBe(before);
    });

    test("experts' products of two packed factors are those of their values", async () => {
      const results = scope(() => {
        const x = quantize(device.tensor(wave(9 * 64, 0.11), [9, 64]), "mxfp8_e5m2");
        const stack = quantize(device.tensor(wave(3 * 20 * 64, 0.37), [3, 20, 64]), "mxfp8_e4m3");
        const offsets = device.tensor(Uint32Array.of(0, 4, 4, 9), [4]);
        const values = grouped_linear(dequantize(x), dequantize(stack), offsets);
        return [grouped_linear_packed(x, stack, offsets), values];
      });
      const [packed, values] = await Promise.all(results.map((result) => result.read()));
      packed!.forEach((value, i) => expect(value).toBeCloseTo(values![i]!, 4));
      results.forEach((result) => result.dispose());
    });

    test("takes the bits per value that it says, and gives them back", () => {
      const before = device.pool.liveBytes;
      const values = device.tensor(wave(64 * 1024, 0.01), [64, 1024]);
      const formats = [
        ["q8", 8.5], ["q4", 4.5], ["mxfp8_e4m3", 8.25], ["mxfp4", 4.25], ["fp8_blockwise", 8.25],
      ] as const;
      for (const [format, bits] of formats) {
        const weight = quantize(values, format);
        expect(weight.size).toBe(values.size);
        expect(weight.byteLength).toBe((values.size * bits) / 8);
        weight.retain().release();
        weight.dispose();
      }
      values.dispose();
      expect(device.pool.liveBytes).toBe(before);
    });

    test("gradients flow to x through a quantised weight", async () => {
      const weight = quantize(device.tensor(wave(8 * 32, 0.7), [8, 32]), "q8");
      const x = device.tensor(wave(3 * 32, 0.2), [3, 32]);
      x.requiresGrad = true;
      const tape = new Tape();
      const y = tape.run(() => linear(x, weight, null));
      const dy = device.tensor(wave(24, 0.9), [3, 8]);
      const gradient = tape.backward([y], [dy]).get(x.key)!;
      const found = await gradient.read();
      const [w, g] = [await dequantize(weight).read(), await dy.read()];
      for (let i = 0; i < 3 * 32; i++) {
        let sum = 0;
        for (let n = 0; n < 8; n++) sum += g[Math.floor(i / 32) * 8 + n]! * w[n * 32 + (i % 32)]!;
        expect(found[i]).toBeCloseTo(sum, 5);
      }
    });

    test("a width that is not whole blocks is refused by name and leaves nothing behind", () => {
      const values = device.tensor(wave(4 * 40, 1), [4, 40]);
      const before = device.pool.liveBytes;
      expect(() => quantize(values, "q4")).toThrow(/quantize.*multiple of 32, the block of q4.*\[4, 40\]/);
      expect(device.pool.liveBytes).toBe(before);
      values.dispose();
    });
  });
});
