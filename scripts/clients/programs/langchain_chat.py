"""LangChain's ChatOpenAI: asked once, streamed, in a batch, and in a chain. Arguments: URL and model."""

import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

if __name__ == "__main__":
    url, model = sys.argv[1:]
    chat = ChatOpenAI(base_url=f"{url}/v1", model=model, api_key="none", temperature=0, max_tokens=8, max_retries=0)
    whole = chat.invoke([("system", "Be brief."), ("human", "Say hello.")])
    assert whole.content
    assert 0 < whole.usage_metadata["output_tokens"] <= 8
    pieces = list(chat.stream([("system", "Be brief."), ("human", "Say hello.")], stream_usage=True))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert any(piece.usage_metadata for piece in pieces)
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke("Say hello.")
    assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    batch = chat.batch([f"Count to {i}." for i in range(6)])
    assert len(batch) == 6
    chain = ChatPromptTemplate.from_messages([("human", "Name a {thing}.")]) | chat | StrOutputParser()
    assert chain.invoke({"thing": "colour"})
    print("invoke, stream, log-probabilities, batch of 6, chain")
