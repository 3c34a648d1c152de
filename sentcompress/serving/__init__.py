"""``sentcompress serve``: a model behind the HTTP API that programs for OpenAI's server already speak.

From top to bottom: :mod:`~sentcompress.serving.server` runs everything, :mod:`~sentcompress.serving.guard` lets
requests in, :mod:`~sentcompress.serving.http_app` answers them in the form of :mod:`~sentcompress.serving.openai_form`,
:mod:`~sentcompress.serving.scheduler` owns the model, and one of two engines writes:
:mod:`~sentcompress.serving.sentence_engine` or :mod:`~sentcompress.serving.llm_engine`.
:mod:`~sentcompress.serving.try_page` has a page to try it with.
"""
