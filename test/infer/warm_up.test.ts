import { expect, test } from "vitest";
import { Generator } from "../../src/infer/engine.ts";
import { pipelinesOf } from "../../src/kernel/pipelines.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { onEveryAdapter } from "../support/devices.ts";

await onEveryAdapter((_, open) => {
  for (const draft of [0, 2]) {
    test(`warming up with ${draft} drafts compiles what the first token needs, and takes no memory`, async (
      ) => {
      const device = await open();
      const config = preset("unit");
      const pipelines = pipelinesOf(device);
      Generator.warmUp(device, config, 5, { draft });
      const { liveBytes, created } = device.pool;
      expect([liveBytes, created, device.bindGroupsCreated, device.stream.submits]).toEqual([0, 0, 0, 0]);
      const compiled = pipelines.size;
      expect(compiled).toBeGreaterThan(5);
      const model = new NemotronH(config, createParameters(device, config, 1));
      const generator = new Generator(model, 16);
      const tokens = generator.generate([1, 2, 3, 4, 5], { maxTokens: 4, draft });
      let sizeAtPrompt = 0;
      const settle = device.settle.bind(device);
      device.settle = () => {
        sizeAtPrompt ||= pipelines.size;
        return settle();
      };
      await tokens.next();
      expect(sizeAtPrompt).toBe(compiled);
      for await (const _ of tokens) {
        // to the end
      }
      const { stats } = generator;
      expect(stats.firstTokenMs).toBeGreaterThan(0);
      expect(stats.compileMs).toBeGreaterThan(0);
      expect(stats.hostMs).toBeLessThan(stats.decodeMs);
      // A second run finds everything compiled.
      for await (const _ of generator.generate([1, 2, 3, 4, 5], { maxTokens: 4, draft })) {
        // to the end
      }
      expect(stats.compileMs).toBe(0);
      generator.dispose();
      model.dispose();
      expect(device.pool.liveBytes).toBe(0);
      device.destroy();
    });
  }
});
