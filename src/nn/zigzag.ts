/**
 * Positions of a row over ranks: of 2 n equal parts rank r has parts r and 2 n - 1 - r, so that causal
 * attention costs all ranks the same.
 * @returns for every rank its positions, in the order in which it holds them
 */
export function zigzag(ranks: number, length: number): number[][] {
  const part = length / (2 * ranks);
  const positions = (index: number) => Array.from({ length: part }, (_, i) => index * part + i);
  return Array.from({ length: ranks }, (_, rank) => [...positions(rank), ...positions(2 * ranks - 1 - rank)]);
}
