export const y = 7 as number;
