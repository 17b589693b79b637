/** Runs beside every test file, whose process others share: what it has borrowed or changed goes back. */
import { afterAll, expect, vi } from "vitest";
import { giveBack } from "./lending.ts";

const before = { ...process.env };

afterAll(() => {
  giveBack();
  vi.unstubAllEnvs();
  const changed = { ...process.env };
  for (const name of Object.keys(changed)) if (!(name in before)) delete process.env[name];
  Object.assign(process.env, before);
  expect(changed, "a test file leaves the environment as it was").toEqual(before);
});
