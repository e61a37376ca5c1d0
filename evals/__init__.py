"""Evaluation of a converted model against its teacher and against its own softmax window.

run           everything below on every variant, into one results file
controls      the variants: teacher, student, window_only
lm_eval_tasks, task_data    lm-eval's stock tasks, on the Hub's data or on local files
perplexity, recall, scoring, text_files    what short benchmarks cannot show: positions far beyond the window
bench, bench_entries, bench_suites, bench_timing, bench_report    the ops next to other kernels
results_file, report        the JSON, its table and its page of plots
"""
