import { expect, test } from "vitest";
import { runInPage, withPage } from "./chromium.ts";
import type { WorkerReport } from "./worker.page.ts";

test("the worker refuses, survives a lost device, pauses and stops", { timeout: 150_000 }, async () => {
  const report = await withPage((page, url) =>
    runInPage<WorkerReport>(page, url, "test/browser/worker.page.ts"));
  const { refusals, events } = report;
  expect(refusals).toEqual({
    "no WebGPU": expect.stringMatching(/^no-webgpu: No WebGPU adapter was found/),
    "training without WebGPU": expect.stringMatching(/^no-webgpu: /),
    "terminated": "failed: The worker was terminated.",
    "no script": expect.stringMatching(/^failed: The worker failed: .*script/),
    "generating without a model": "input: There is no model yet; train one first.",
    "saving without a model": "input: There is no model yet; train one first.",
    "no text": expect.stringMatching(/^input: .*holds no text/),
    "no steps": expect.stringMatching(/^input: .*steps must be .*found 0/),
    "no such preset": expect.stringMatching(/^input: preset: expected one of .*tiny.*found "huge"/),
    "no prompt": expect.stringMatching(/^input: The prompt is empty/),
    "training twice": expect.stringMatching(/^input: Training is already under way/),
    "generating while training": expect.stringMatching(/^input: The worker is busy/),
    "device taken away": expect.stringMatching(/^device-lost: The GPU device was lost \(destroyed\)/),
    "generating after the loss": "input: There is no model yet; train one first.",
  });

  const phases = events.flatMap((event) => (event.kind === "phase" ? [event.phase] : []));
  expect(phases).toEqual(["preparing", "compiling", "training", "paused", "evaluating"]);
  const steps = events.flatMap((event) => (event.kind === "step" ? [event] : []));
  // One more step may have begun when the request to pause arrives.
  expect(steps.map(({ step }) => step)).toEqual(steps.length === 2 ? [1, 2] : [1, 2, 3]);
  expect(steps[0]!.bits_per_byte).toBeGreaterThan(7);
  for (const { memory } of steps) {
    expect(memory.live).toBeGreaterThan(0);
    expect(Math.min(memory.peak, memory.held)).toBeGreaterThanOrEqual(memory.live);
  }
  expect([steps[0]!.seconds_left, steps[1]!.seconds_left! > 0]).toEqual([null, true]);
  expect(events.filter(({ kind }) => kind === "evaluation")).toHaveLength(1);
  expect(report).toMatchObject({ steps: steps.length, stopped: true, written: expect.stringMatching(/[^]/) });
  // Whatever a run takes beside its model it gives back.
  expect(report.live[1]).toBe(report.live[0]);
});
