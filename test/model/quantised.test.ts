import { describe, expect, test } from "vitest";
import { Generator } from "../../src/infer/engine.ts";
import { memorySource } from "../../src/io/files.ts";
import { loadModel, modelFiles } from "../../src/models/checkpoint.ts";
import { evaluate, evaluateIncremental } from "../../src/models/evaluate.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters, createWeights } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { cast } from "../../src/ops/cast.ts";
import { dequantize } from "../../src/ops/quantize.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { Trainer } from "../../src/train/trainer.ts";
import { onEveryAdapter } from "../support/devices.ts";

const config = preset("tiny");
const inputs = (seqlen: number) => ({
  batch: 1, seqlen, input_ids: Int32Array.from({ length: seqlen }, (_, i) => (37 * i) % 256),
  labels: Int32Array.from({ length: seqlen }, (_, i) => (37 * i) % 256),
});

function largestError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [error, scale] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error = Math.max(error, Math.abs(found[i]! - expected[i]!));
    scale = Math.max(scale, Math.abs(expected[i]!));
  }
  return error / scale;
}

await onEveryAdapter((device) => {
  describe("a model with quantised weights", () => {
    for (const format of ["f16", "bf16"] as const) {
      test(`${format} computes what its weights stand for`, async () => {
        const before = device.pool.liveBytes;
        const model = new NemotronH(config, createWeights(device, config, 5, format));
        const values = [...model.parameters].map(
          ([name, tensor]): [string, Tensor] => [name, cast(tensor, "f32")]);
        const dense = new NemotronH(config, new Map(values));
        const expected = (await evaluate(dense, inputs(21))).get("logits")!.data;
        expect(largestError((await evaluate(model, inputs(21))).get("logits")!.data, expected)).toBeLessThan(
          2e-5);
        const pieces = await evaluateIncremental(model, inputs(21), [17, 1, 1, 1, 1]);
        expect(largestError(pieces.logits, expected)).toBeLessThan(2e-5);
        model.dispose();
        dense.dispose();
        expect(device.pool.liveBytes).toBe(before);
      });
    }

    for (const format of ["q8", "q4", "fp8", "mxfp8", "nvfp4"] as const) {
      test(`${format} computes what its weights stand for, in one piece and token by token`, async () => {
        const before = device.pool.liveBytes;
        const model = new NemotronH(config, createWeights(device, config, 5, format));
        expect([...model.quantised.keys()].some((name) => name.endsWith("experts.up_proj"))).toBe(true);
        const values: [string, Tensor][] =
          [...model.quantised].map(([name, blocks]) => [name, dequantize(blocks)]);
        const dense = new NemotronH(config, new Map([...model.parameters, ...values]));
        const [found, expected] = [await evaluate(model, inputs(21)), await evaluate(dense, inputs(21))];
        for (const name of ["logits", "mtp.logits", "loss"]) {
          expect(largestError(found.get(name)!.data, expected.get(name)!.data)).toBeLessThan(2e-5);
        }
        const pieces = await evaluateIncremental(model, inputs(21), [13, 3, 1, 1, 1, 1, 1]);
        expect(largestError(pieces.logits, expected.get("logits")!.data)).toBeLessThan(2e-5);
        for (const [, tensor] of values) tensor.dispose();
        model.dispose();
        expect(device.pool.liveBytes).toBe(before);
      });
    }

    test("is loaded from a checkpoint matrix by matrix, and takes a fraction of the memory", async () => {
      const before = device.pool.liveBytes;
      const original = new NemotronH(config, createParameters(device, config, 5));
      const dense = device.pool.liveBytes - before;
      const files = new Map<string, Uint8Array>();
      for (const [name, content] of Object.entries(modelFiles(original))) {
        const pieces: Uint8Array[] = [];
        if (typeof content === "string") pieces.push(new TextEncoder().encode(content));
        else for await (const piece of content) pieces.push(piece);
        files.set(name, new Uint8Array(await new Blob(pieces as BlobPart[]).arrayBuffer()));
      }
      original.dispose();
      const folder = {
        name: "memory",
        open: async (file: string) => files.has(file) ? memorySource(file, files.get(file)!) : null,
      };
      device.pool.resetPeak();
      const model = await loadModel(device, config, folder, false, "q8");
      const held = device.pool.liveBytes - before;
      expect(held).toBeLessThan(0.45 * dense);
      // No more than the largest matrix lies there in f32 beside the blocks.
      expect(device.pool.peakBytes - before - held).toBeLessThan(0.3 * dense);
      const created = new NemotronH(config, createWeights(device, config, 5, "q8"));
      const [found, expected] = [await evaluate(model, inputs(9)), await evaluate(created, inputs(9))];
      expect(found.get("logits")!.data).toEqual(expected.get("logits")!.data);
      created.dispose();

      const generator = new Generator(model, 40);
      const tokens: number[] = [];
      for await (const token of generator.generate([1, 2, 3], { maxTokens: 12, draft: 2 })) tokens.push(
        token);
      expect(tokens).toHaveLength(12);
      generator.dispose();
      await expect(loadModel(device, config, folder, true, "q8")).rejects.toThrow(
        /trained must be f32, found q8/);
      model.dispose();
      expect(device.pool.liveBytes).toBe(before);
    });

    test("is neither written as a checkpoint nor trained", () => {
      const model = scope(() => new NemotronH(config, createWeights(device, config, 1, "q4")));
      expect(() => modelFiles(model)).toThrow(/A checkpoint holds f32 weights, but .* is q/);
      expect(() => new Trainer(model, {} as never)).toThrow(/Only f32 weights can be trained, but .* is q/);
      model.dispose();
    });
  });
});
