import { provider } from "#gpu";
import { matching } from "../../src/gpu/adapters.ts";
import type { AdapterHandle } from "../../src/gpu/adapters.ts";
import { lending } from "./lending.ts";

/**
 * The adapters that tests run on: every one found, or the one that `KRAIT_ADAPTER` names.
 *
 * @param devices "lent" (default): devices that were used before and will be again; "own": real ones
 * @throws Error when there is none, so that a run without an adapter can never pass for want of tests
 */
export async function testAdapters(devices: "lent" | "own" = "lent"): Promise<AdapterHandle[]> {
  const found = await provider.listAdapters();
  const wanted = process.env["KRAIT_ADAPTER"];
  const chosen = wanted ? matching(found, wanted) : found;
  if (chosen.length === 0) {
    const ids = found.map(({ info }) => info.id).join(", ") || "none";
    throw new Error(`No adapter to test on: KRAIT_ADAPTER is "${wanted ?? ""}", found: ${ids}.`);
  }
  return devices === "lent" ? chosen.map(lending) : chosen;
}
