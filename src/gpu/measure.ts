/**
 * Milliseconds of `runs` calls of `work`, each waited for; the smallest first. Fewer where they take longer
 * than `enoughMs` together.
 */
export async function sortedTimes(
  runs: number, work: () => void, finish: () => Promise<void>, enoughMs = Infinity,
): Promise<number[]> {
  const times: number[] = [];
  const since = performance.now();
  while (times.length < runs && (times.length === 0 || performance.now() - since < enoughMs)) {
    const start = performance.now();
    work();
    await finish();
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b);
}

export function median(sorted: readonly number[]): number {
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
