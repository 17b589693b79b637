/** What passes between ranks in a training step, as a table. */
import type { CollectiveSum } from "../train/trace.ts";
import { formatBytes, table } from "./terminal.ts";

/** A row for each kind of collective in each kind of group. */
export function collectiveTable(sums: readonly CollectiveSum[]): string {
  const isTimed = sums.some(({ milliseconds }) => milliseconds !== null);
  const most = sums.some(({ at_most }) => at_most) ? "at most " : "";
  return table([
    [" collective", "group", "calls", `${most}bytes of a rank`, "of all ranks", ...isTimed ? ["ms"] : []],
    ...sums.map(({ kind, group, calls, bytes_per_rank, bytes, milliseconds }) => [
      ` ${kind}`, group, String(calls), formatBytes(bytes_per_rank), formatBytes(bytes),
      ...isTimed ? [milliseconds!.toFixed(2)] : [],
    ]),
  ], { align: ["left", "left", "right", "right", "right", "right"] });
}
